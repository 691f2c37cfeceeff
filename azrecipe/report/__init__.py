"""What happened, for people: run directories as terminal tables."""
