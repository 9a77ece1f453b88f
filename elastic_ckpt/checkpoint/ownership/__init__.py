"""Who may write, and who keeps what from being deleted."""
