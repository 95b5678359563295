"""What every job needs of its machine: ranks, signals, devices, progress, a record of the run."""
