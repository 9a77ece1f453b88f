"""What a script does with its model and optimizer that no checkpoint restores by itself."""
