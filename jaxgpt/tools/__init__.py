"""The commands that measure, compare and plan runs."""
