"""Where the bytes of a cache lie: a folder, or an object store."""
