"""text -> ids -> windows -> device batches."""
