"""What every job needs from its machine: ranks, signals, devices, progress, a record of the run."""
