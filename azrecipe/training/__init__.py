"""One resumable training loop: optimizer, precision, checkpoints and monitoring."""
