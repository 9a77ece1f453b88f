"""The daemon: one supervisor per node, and its child, the agent. The supervisor imports no torch."""
