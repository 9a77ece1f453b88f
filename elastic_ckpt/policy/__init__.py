"""Decisions as pure functions of values: when to save, what to retry, what to keep."""
