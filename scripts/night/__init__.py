"""A job that has a bad night, for pictures and tests."""
