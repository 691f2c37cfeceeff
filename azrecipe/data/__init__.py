"""Documents to batches: read, cleaned, deduplicated, tokenised, mixed and packed."""
