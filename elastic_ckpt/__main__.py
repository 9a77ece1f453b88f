"""``python -m elastic_ckpt`` is ``elastic-ckpt``."""

from elastic_ckpt.cli.app import main

main()
