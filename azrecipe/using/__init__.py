"""What a finished model is for: tried in a terminal, served, exported, pushed."""
