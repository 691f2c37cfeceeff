"""Parse, inherit, validate and type YAML recipes."""
