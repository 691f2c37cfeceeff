"""Build the dataclasses of `recipe.types` from checked plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build_dataclass(kind: type[T], data: Mapping[str, Any]) -> T:
    """Build a dataclass by its annotations; every key must be a field."""
    hints = get_type_hints(kind)
    unknown = data.keys() - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise TypeError(f"{kind.__name__} has no field for {sorted(unknown)}")
    return kind(**{key: _convert(hints[key], value) for key, value in data.items()})


def _convert(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        options = [a for a in arguments if a is not NoneType]
        if isinstance(value, dict):
            return _convert(next(a for a in options if is_dataclass(a) or get_origin(a) is dict), value)
        if isinstance(value, list):
            return _convert(next(a for a in options if get_origin(a) is list), value)
        return value if len(options) > 1 else _convert(options[0], value)
    if is_dataclass(hint) and isinstance(hint, type):
        return build_dataclass(hint, value)
    if origin is list:
        return [_convert(arguments[0], item) for item in value]
    if origin is Mapping:
        return {key: _convert(arguments[1], item) for key, item in value.items()}
    return float(value) if hint is float else value
