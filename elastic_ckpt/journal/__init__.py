"""What happened to a job: typed events, written once and folded once."""
