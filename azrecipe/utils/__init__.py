"""Helpers that need no model, text or recipe."""
