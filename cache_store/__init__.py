"""A cache of teacher targets on disk: its format, and how it is written, committed, read, verified and repaired.

Needs numpy, numcodecs and zarr; imports no model, no loss and no torch. From the bottom up:

* ``errors``: every error of a cache
* ``storage``: whole objects by name, in a folder or at an fsspec URL; ``codecs``: one array <-> its stored parts
* ``rows``: one sample's targets, and many of them as a shard in memory
* ``formats``: a shard <-> the bytes of one object
* ``protocol``: manifest, plan, commit records; write, read, verify, repair and convert a cache
"""
