"""``elastic-ckpt systemd``: the units, which this package contains, on this machine."""
