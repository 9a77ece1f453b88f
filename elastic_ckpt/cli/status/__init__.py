"""``elastic-ckpt status``."""
