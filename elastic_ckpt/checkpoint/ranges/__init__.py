"""Large files of which a machine has only the chunks that its ranks read."""
