"""What happened in runs, as HTML pages and terminal tables."""
