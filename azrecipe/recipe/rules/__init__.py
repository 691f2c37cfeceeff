"""Rules that a schema cannot express, by stage."""
