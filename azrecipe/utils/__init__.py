"""Mechanics that know nothing of models, text or recipes."""
