"""What every package uses and no subject owns: text, units, files, processes."""
