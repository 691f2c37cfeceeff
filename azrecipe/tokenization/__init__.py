"""Text to token ids: tokenizers opened, trained, extended and compared."""
