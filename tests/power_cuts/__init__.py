"""Power cuts of real file systems: what a kernel writes is recorded and replayed in part."""
