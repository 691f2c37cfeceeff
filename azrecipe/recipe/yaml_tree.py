"""Parse the YAML dialect of recipes into a tree with locations.

`2e-5` and `1.5` are floats, `5_000` is an integer, `true` and `false` are the only booleans, everything else is text
(`no` is a language, a date is a string). No tags, no merge keys, few aliases, no duplicate keys.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from azrecipe.errors import Problem, RecipeError, SourceLocation
from azrecipe.recipe.yaml_syntax import describe_syntax_error, find_invisible_character

Scalar: TypeAlias = "str | int | float | bool | None"
Key: TypeAlias = "str | int"
MAX_NODES = 20_000  # more than any recipe needs; aliases could multiply without end
MAX_DIGITS = 1_000  # Python refuses to read integers of a few thousand digits


@dataclass(frozen=True)
class YamlNode:
    """A value of a recipe with its location and its key's."""

    value: Scalar | list[YamlNode] | dict[str, YamlNode]
    location: SourceLocation
    key_location: SourceLocation | None = None

    @property
    def entry_location(self) -> SourceLocation:
        """The key's location, or the value's if there is no key."""
        return self.key_location or self.location

    @property
    def number(self) -> float | None:
        """The value as a number; None for true, false and all else."""
        return self.value if isinstance(self.value, int | float) and not isinstance(self.value, bool) else None

    def get(self, *keys: Key) -> YamlNode | None:
        """Return the node at a path of keys, or None."""
        node: YamlNode | None = self
        for key in keys:
            if node is None:
                return None
            if isinstance(node.value, dict) and isinstance(key, str):
                node = node.value.get(key)
            elif isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
            else:
                return None
        return node

    def find_nearest(self, keys: tuple[Key, ...]) -> YamlNode:
        """Return the node at a path of keys, or its nearest parent."""
        for end in range(len(keys), 0, -1):
            node = self.get(*keys[:end])
            if node is not None:
                return node
        return self

    def to_plain(self) -> Any:
        """Return the tree as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.to_plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.to_plain() for node in self.value]
        return self.value


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")


def parse_scalar(text: str) -> Scalar:
    """Return the value of an unquoted YAML scalar.

    `.inf`, `.nan` and numbers beyond the range of a float stay text, as no key allows them.
    """
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if _INTEGER.fullmatch(text) and len(text) <= MAX_DIGITS:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text.replace("_", ""))):
        return number
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(
                None, None, f"the tag {event.tag} is not allowed in a recipe: quote the value if it is text", event.start_mark
            )
        return super().compose_node(parent, index)


class _TreeBuilder:
    """Turns PyYAML's nodes into a tree, and collects problems."""

    def __init__(self, file: str, location: SourceLocation | None) -> None:
        self.file, self.location = file, location
        self.problems: list[Problem] = []
        self.num_nodes = 0

    def to_location(self, mark: yaml.Mark) -> SourceLocation:
        return self.location or SourceLocation(self.file, mark.line + 1, mark.column + 1)

    def build(self, node: yaml.Node) -> YamlNode:
        """Build the tree below a node.

        An alias counts as a node each time it is used.
        """
        self.num_nodes += 1
        location = self.to_location(node.start_mark)
        if self.num_nodes > MAX_NODES:
            raise RecipeError([Problem(location, f"more than {MAX_NODES:,} values: aliases (*name) multiply too far")])
        if isinstance(node, yaml.ScalarNode):
            return YamlNode(parse_scalar(node.value) if node.style is None else node.value, location)
        if isinstance(node, yaml.SequenceNode):
            return YamlNode([self.build(item) for item in node.value], location)
        entries: dict[str, YamlNode] = {}
        previous: yaml.Node | None = None
        for key, value in node.value:
            key_location = self.to_location(key.start_mark)
            if previous is not None and (number := _join_decimal_comma(previous, key, value)):
                self.problems.append(Problem(self.to_location(previous.start_mark), number))
                continue
            previous = value
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(key_location, "a key must be text: quote {{ … }}, [ … ] and { … } that are text"))
                continue
            if key.style is None and (character := find_invisible_character(key.value)) is not None:
                self.problems.append(Problem(key_location, f"a key with the invisible character {character}: remove it, or write a space"))
                continue
            if _CONTROL.search(key.value):
                text = json.dumps(key.value, ensure_ascii=False)
                self.problems.append(Problem(key_location, f"a key with a line break or another control character: {text}"))
                continue
            if key.value in entries:
                first = entries[key.value].entry_location
                self.problems.append(Problem(key_location, f"duplicate key '{key.value}': it is already in line {first.line}"))
                continue
            entries[key.value] = replace(self.build(value), key_location=key_location)
        return YamlNode(entries, location)


def _join_decimal_comma(before: yaml.Node, key: yaml.Node, value: yaml.Node) -> str | None:
    """Describe a decimal comma: `{weight: 1,5}` reads `{weight: 1, 5: null}`.

    Returns None where there is none.
    """
    nodes = (before, key, value)
    if not all(isinstance(node, yaml.ScalarNode) and node.style is None for node in nodes) or value.value:
        return None
    is_adjacent = before.end_mark.index + 1 == key.start_mark.index
    if not is_adjacent or not _INTEGER.fullmatch(before.value) or not _FLOAT.fullmatch(key.value) or key.value[0] in "+-.":
        return None
    return f"{before.value},{key.value} has a comma: {suggest_number(f'{before.value},{key.value}')}"


_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def suggest_number(text: str) -> str | None:
    """Return how to write a text that is a number in another notation.

    Returns None for other texts.
    """
    if text.endswith(",") and suggest_number(text[:-1]) == "write it without quotes":
        return "remove the comma"
    match = re.fullmatch(r"([-+]?[0-9]+)((?:,[0-9]{3})+|,[0-9]*)?([eE][-+]?[0-9]+)?", text)
    if match and match[2]:
        whole, point = text.replace(",", ""), text.replace(",", ".")
        if match[2].count(",") > 1:
            return f"write {whole}"
        is_thousands = len(match[2]) == 4 and not match[3] and match[1].lstrip("+-0")
        return f"write {point}, or {whole} if thousands are meant" if is_thousands else f"write {point}"
    if match := re.fullmatch(r"([0-9]+)(?:\.([0-9]+))? ?([kKmMgG])", text):
        number = int(match[1] + (match[2] or "")) * _UNITS[match[3].lower()] // 10 ** len(match[2] or "")
        return f"write the number without a unit: {number}"
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", text):
        return f"write the share: {float(match[1]) / 100:g}"
    if isinstance(parse_scalar(text), int | float) and not isinstance(parse_scalar(text), bool):
        return "write it without quotes"
    return None


def parse_yaml(text: str, file: str, location: SourceLocation | None = None) -> YamlNode:
    """Parse YAML text.

    Args:
        text: The YAML.
        file: The name of the file in locations.
        location: Replaces every location, for a value from the command line.

    Raises:
        RecipeError: Every duplicate or non-text key, or the first syntax error.
    """
    builder = _TreeBuilder(file, location)
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        built = builder.build(root) if root is not None else YamlNode(None, location or SourceLocation(file, 1, 1))
    except yaml.MarkedYAMLError as error:
        problem = describe_syntax_error(error, text)
        raise RecipeError([Problem(location or SourceLocation(file, problem.line + 1, problem.column + 1), problem.message)]) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        error_location = location or SourceLocation(file, before.count("\n") + 1, error.position - before.rfind("\n"))
        raise RecipeError([Problem(error_location, f"the character U+{ord(text[error.position]):04X} is not allowed in YAML")]) from None
    except RecursionError:
        raise RecipeError([Problem(location or SourceLocation(file, 1, 1), "nested too deeply")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    if builder.problems:
        raise RecipeError(builder.problems)
    return built


def decode_utf8(data: bytes, file: str) -> str:
    """Decode a recipe file without its byte-order mark.

    Raises RecipeError at the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode("utf-8", "replace")) + 1
        message = f"not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8"
        raise RecipeError([Problem(SourceLocation(file, before.count(b"\n") + 1, column), message)]) from None
