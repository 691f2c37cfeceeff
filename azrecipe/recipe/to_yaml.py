"""A resolved recipe as YAML that our own dialect reads back to the same values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from azrecipe.recipe.yaml_tree import scalar

_BREAKS = "\r\x85\u2028\u2029"  # line ends to YAML, which reads them as \n or a space unless they are escaped


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """Quote text that our dialect, or PyYAML itself, would not read back as it is."""
    unsafe = not isinstance(scalar(value), str) or any(character in _BREAKS for character in value)
    style = '"' if unsafe else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    return dumper.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)


def to_yaml(data: Mapping[str, Any]) -> str:
    """The recipe, one key a line, in the order that it has."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
