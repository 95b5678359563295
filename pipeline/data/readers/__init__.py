"""Readers: one module for each shape of data, with the two functions of :class:`alignkd.pipeline.data.contract.Reader`."""
