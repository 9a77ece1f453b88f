"""The daemon: a supervisor per node, which imports no torch, and its child, the agent."""
