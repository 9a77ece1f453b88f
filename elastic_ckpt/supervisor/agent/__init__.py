"""The agent: the child process that runs torch elastic and launches the workers."""
