"""``elastic-ckpt doctor``."""
