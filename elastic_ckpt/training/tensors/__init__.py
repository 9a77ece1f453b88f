"""Tensor files: writing, reading, resharding."""
