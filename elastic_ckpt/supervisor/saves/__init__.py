"""When the next save is due, how long it takes, and the drain to the disk."""
