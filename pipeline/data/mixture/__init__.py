"""Several data as one."""
