"""The one YAML dialect of recipes, read into a tree in which every value knows its place.

`2e-5` and `1.5` are floats, `5_000` is an integer, `true` and `false` are the only booleans, everything else is text
(`no` is a language, a date is a string). No tags, no merge keys, few aliases, no duplicate keys.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from azrecipe.errors import Place, Problem, RecipeError

Scalar: TypeAlias = "str | int | float | bool | None"
Key: TypeAlias = "str | int"
MAX_NODES = 20_000  # an alias bomb is larger, no recipe is
MAX_DIGITS = 1_000  # Python refuses to read integers of a few thousand


@dataclass(frozen=True)
class Node:
    """A value, where it was written and, inside a mapping, where its key was."""

    value: Scalar | list[Node] | dict[str, Node]
    place: Place
    key_place: Place | None = None

    @property
    def at(self) -> Place:
        """Where to point a reader: at the key if there is one."""
        return self.key_place or self.place

    def get(self, *keys: Key) -> Node | None:
        """The node below these keys, or None."""
        node: Node | None = self
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

    def nearest(self, keys: tuple[Key, ...]) -> Node:
        """The node below these keys, or the deepest one on the way that exists."""
        for end in range(len(keys), 0, -1):
            found = self.get(*keys[:end])
            if found is not None:
                return found
        return self

    def plain(self) -> Any:
        """The same as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")


def scalar(text: str) -> Scalar:
    """What an unquoted YAML scalar means in a recipe. `.inf`, `.nan` and endless numbers stay text: no key of ours takes them."""
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
    """PyYAML's composer, refusing tags and counting the nodes that aliases multiply."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"the tag {event.tag} is not allowed in a recipe", event.start_mark)
        return super().compose_node(parent, index)


class _Builder:
    def __init__(self, file: str, at: Place | None) -> None:
        self.file, self.at = file, at
        self.problems: list[Problem] = []
        self.nodes = 0

    def place(self, mark: yaml.Mark) -> Place:
        return self.at or Place(self.file, mark.line + 1, mark.column + 1)

    def build(self, node: yaml.Node) -> Node:
        self.nodes += 1
        place = self.place(node.start_mark)
        if self.nodes > MAX_NODES:
            raise RecipeError([Problem(place, f"more than {MAX_NODES:,} values: aliases (*name) multiply too far")])
        if isinstance(node, yaml.ScalarNode):
            return Node(scalar(node.value) if node.style is None else node.value, place)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.build(item) for item in node.value], place)
        entries: dict[str, Node] = {}
        for key, value in node.value:
            key_place = self.place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(key_place, "a key must be text"))
                continue
            if key.value in entries:
                first = entries[key.value].at
                self.problems.append(Problem(key_place, f"duplicate key '{key.value}': it stands already in line {first.line}"))
                continue
            entries[key.value] = replace(self.build(value), key_place=key_place)
        return Node(entries, place)


def parse(text: str, file: str, at: Place | None = None) -> Node:
    """Read YAML text. `at` replaces every place (for a value from the command line).

    Raises RecipeError with every duplicate or non-text key, or with the first error of syntax.
    """
    builder = _Builder(file, at)
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        built = builder.build(root) if root is not None else Node(None, at or Place(file, 1, 1))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = builder.place(mark) if mark else at or Place(file, 1, 1)
        raise RecipeError([Problem(place, _syntax(error, text, mark))]) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = at or Place(file, before.count("\n") + 1, error.position - before.rfind("\n"))
        raise RecipeError([Problem(place, f"the character U+{ord(text[error.position]):04X} is not allowed in YAML")]) from None
    except RecursionError:
        raise RecipeError([Problem(at or Place(file, 1, 1), "nested too deeply")]) from None
    finally:
        if loader is not None:
            loader.dispose()
    if builder.problems:
        raise RecipeError(builder.problems)
    return built


def _syntax(error: yaml.MarkedYAMLError, text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in str(error.problem):
        return "a tab in the indentation: YAML wants spaces"
    parts = [part for part in (error.context, error.problem) if part]
    return "not valid YAML: " + "; ".join(parts)


def decode(data: bytes, file: str) -> str:
    """UTF-8 text of a recipe file (a byte-order mark is dropped); RecipeError points at the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        column = len(before[line_start:].decode("utf-8", "replace")) + 1
        message = f"not UTF-8: byte 0x{data[error.start]:02x}; save the file as UTF-8"
        raise RecipeError([Problem(Place(file, before.count(b"\n") + 1, column), message)]) from None
