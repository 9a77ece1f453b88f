"""Watches the ranks through the board: hangs, recoveries, progress."""
