"""What the file says: YAML with positions, inheritance, overrides and schemas, down to frozen dataclasses."""
