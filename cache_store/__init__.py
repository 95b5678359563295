"""The disk: what a cache of teacher targets is made of, and how it is written, committed, read and audited.

Knows numpy, numcodecs and zarr; knows nothing of models, losses or torch.
"""
