"""The engine for ColossalAI; no other module imports it."""
