"""For loops whose framework or script saves: when to save, and the sealing of what it wrote."""
