"""Checkpoints that the script writes itself: sealed where they are, verified before each start."""
