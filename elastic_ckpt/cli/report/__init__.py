"""``elastic-ckpt report``."""
