"""``elastic-ckpt run``."""
