"""What measures and plans a run."""
