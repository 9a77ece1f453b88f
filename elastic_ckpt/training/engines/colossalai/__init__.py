"""The engine for ColossalAI, the only package that imports it."""
