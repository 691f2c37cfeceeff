"""Write a resolved recipe as YAML of azrecipe's dialect.

Reading it gives the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from azrecipe.recipe.yaml_syntax import find_invisible_character
from azrecipe.recipe.yaml_tree import parse_scalar

_BREAKS = "\r\x85\u2028\u2029"  # YAML reads these line ends as \n or a space unless they are escaped


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """Quote text that would be read as another value."""
    needs_quotes = not isinstance(parse_scalar(value), str) or any(character in _BREAKS for character in value)
    needs_quotes = needs_quotes or find_invisible_character(value) is not None  # a key with one must be quoted
    style = '"' if needs_quotes else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, in the order of its keys."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
