"""The version of alignkd."""

__version__ = "0.1.0"
