"""Checkpoints: their format, commit, verification, listing, retention and cleanup."""
