"""One save and one load, on all ranks."""
