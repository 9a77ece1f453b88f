"""A job with a dozen disturbances, for pictures and tests."""
