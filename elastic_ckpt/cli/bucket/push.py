"""``elastic-ckpt push``."""

from elastic_ckpt.cli.bucket.copy import push_command as command

__all__ = ["command"]
