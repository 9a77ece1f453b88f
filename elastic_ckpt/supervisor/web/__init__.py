"""The live page of ``run --web``."""
