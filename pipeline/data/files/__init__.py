"""Files of data wherever they are: on this machine, at an fsspec URL, or unpacked; and the local cache that keeps copies."""
