"""The disk tier: checkpoints in the job directory, hashed, durable, sealed by one rename."""
