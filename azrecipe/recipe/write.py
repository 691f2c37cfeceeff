"""A resolved recipe as YAML that our own dialect reads back to the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from azrecipe.recipe.yaml_tree import scalar


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """Quote text that our dialect would read as something else (PyYAML's own idea of that differs)."""
    quote = '"' if not isinstance(scalar(value), str) else None
    style = "|" if "\n" in value else quote
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)


def to_yaml(data: Mapping[str, Any]) -> str:
    """The recipe, one key a line, in the order that it has."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
