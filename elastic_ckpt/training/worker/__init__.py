"""The process of a rank: entry point, signals, output."""
