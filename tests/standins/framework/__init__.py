"""Packages with the interface of frameworks that do not import everywhere."""

from pathlib import Path

PLACE = Path(__file__).parent
