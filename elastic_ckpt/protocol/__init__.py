"""Messages and shared memory between processes and nodes; every wire type is defined here."""
