"""Checkpoints on disk: written so that a kill at any moment loses nothing that was sealed."""
