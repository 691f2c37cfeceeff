"""A run directory: its files, lock and status, and its readers."""
