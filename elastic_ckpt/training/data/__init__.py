"""The order of samples, and the place in it."""
