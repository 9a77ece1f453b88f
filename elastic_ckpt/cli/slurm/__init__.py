"""``elastic-ckpt slurm``."""
