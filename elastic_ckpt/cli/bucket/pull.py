"""``elastic-ckpt pull``."""

from elastic_ckpt.cli.bucket.copy import pull_command as command

__all__ = ["command"]
