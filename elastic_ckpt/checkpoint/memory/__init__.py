"""The memory tier: checkpoints in shared memory, and their drain to the disk."""
