"""Every setting of every job, with its default and range, declared once. Needs no torch."""
