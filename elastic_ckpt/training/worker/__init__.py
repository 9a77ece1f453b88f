"""A rank's process: its entry point, signals and output."""
