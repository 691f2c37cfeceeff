"""A training step, run on shapes to measure its cost."""
