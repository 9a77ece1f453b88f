"""``elastic-ckpt replay``."""
