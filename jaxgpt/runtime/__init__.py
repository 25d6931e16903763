"""Run a training job: devices, processes, checkpoints, the run directory and metrics."""
