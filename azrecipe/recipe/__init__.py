"""What the file says: YAML with positions, inheritance, overrides and schemas, down to frozen dataclasses."""

from azrecipe.recipe.load import Recipe, load
from azrecipe.recipe.overrides import Override, parse_overrides

__all__ = ["Override", "Recipe", "load", "parse_overrides"]
