"""How the ranks of a machine bring a checkpoint there from a bucket."""
