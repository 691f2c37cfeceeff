"""What a YAML file says: parsed, inherited, validated and typed."""
