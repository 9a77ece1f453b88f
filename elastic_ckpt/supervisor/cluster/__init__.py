"""What the supervisor does besides on several nodes."""
