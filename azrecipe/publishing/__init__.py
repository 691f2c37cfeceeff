"""A finished model is exported to GGUF and pushed to the hub."""
