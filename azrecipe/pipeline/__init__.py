"""Which process runs which step, and what is refused before."""
