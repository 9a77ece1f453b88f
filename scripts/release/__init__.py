"""Builds what is released; ``make dist``."""
