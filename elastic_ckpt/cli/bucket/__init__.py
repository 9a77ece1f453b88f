"""The commands that copy checkpoints into buckets and out of them."""
