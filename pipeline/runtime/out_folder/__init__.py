"""The folder that a run writes to: held by one run, and what cannot be written there."""
