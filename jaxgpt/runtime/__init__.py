"""What keeps a run alive: devices, processes, checkpoints, the run directory, metrics."""
