"""The YAML dialect: what a scalar means, what is refused and where, and that our own writing is read back the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azrecipe.errors import RecipeError
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.recipe.yaml_tree import decode_utf8, parse_yaml


def value(text: str) -> Any:
    return parse_yaml(f"x: {text}\n", "r.yaml").to_plain()["x"]


def refused(text: str | bytes) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(decode_utf8(text, "r.yaml") if isinstance(text, bytes) else text, "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("2e-5", 2e-5),
        ("1.0e-4", 1e-4),
        ("3E2", 300.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1.5", -1.5),
        ("5_000", 5000),
        ("-3", -3),
        ("010", 10),
        ("0", 0),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("True", "True"),
        ("2024-01-31", "2024-01-31"),
        ("20231101.az", "20231101.az"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        (".inf", ".inf"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
        ("'5'", "5"),
        ('"true"', "true"),
        ("'null'", "null"),
        ("[1, 2.0, no]", [1, 2.0, "no"]),
    ],
    ids=lambda each: repr(each)[:30],
)
def test_scalars(text: str, meaning: Any) -> None:
    found = value(text)
    assert found == meaning
    assert type(found) is type(meaning)


def test_an_anchor_is_read_and_a_merge_key_is_an_ordinary_key() -> None:
    assert parse_yaml("a: &x [1]\nb: *x\n", "r.yaml").to_plain() == {"a": [1], "b": [1]}
    assert parse_yaml("a: &x {k: 1}\nb: {<<: *x}\n", "r.yaml").to_plain()["b"] == {"<<": {"k": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: !!python/object:os.system x\n", "r.yaml:2:4: not valid YAML: the tag"),
        ("a: !!str 5\n", "r.yaml:1:4: not valid YAML: the tag"),
        ("a: !!set {x}\n", "is not allowed in a recipe"),
        ("a: ! x\n", "the tag ! is not allowed in a recipe"),
        ("a:\n  k: 1\n  j: 2\n  k: 3\n", "r.yaml:4:3: duplicate key 'k': it is already in line 2"),
        ("a: {k: 1, k: 2}\n", "r.yaml:1:11: duplicate key 'k'"),
        ("a:\n\tb: 1\n", "r.yaml:2:1: a tab in the indentation: YAML wants spaces"),
        ("a:\n  b: 1\n\tc: 1\n", "r.yaml:3:1: a tab in the indentation"),
        ("a: [1, 2\nb: 3\n", "r.yaml:1:4: '[' is not closed: write ']' at the end of the list"),
        ("a: 'open\n", "r.yaml:1:4: this quoted text is not closed: write ' at its end"),
        ("a: 1\n b: 2\n", "r.yaml:2:3: line 1 has a value, so no keys can stand below it"),
        ("? [1, 2]\n: x\n", "r.yaml:1:3: a key must be text"),
        ("a: *nobody\n", "r.yaml:1:4: *nobody is the value of an anchor &nobody, and there is none above"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1: a second document begins here, and a file has one"),
        ("a: 1\nb: \x07\n", "r.yaml:2:4: the character U+0007 is not allowed in YAML"),
        ("x: " + "[" * 5000 + "]" * 5000, "r.yaml:1:1: nested too deeply"),
        (b"a: 1\nad: q\xc9\n", "r.yaml:2:6: not UTF-8: byte 0xc9; save the file as UTF-8"),
        ("ad: ə".encode("utf-16"), "r.yaml:1:1: not UTF-8: byte 0xff"),
        ("a: ə\nb: ".encode() + b"\xff\n", "r.yaml:2:4: not UTF-8"),
    ],
    ids=lambda each: repr(each)[:30],
)
def test_what_is_refused_and_where(text: str | bytes, message: str) -> None:
    assert message in refused(text)


def test_every_duplicate_key_is_told_at_once() -> None:
    assert refused("a: 1\na: 2\nb: {c: 1, c: 2}\n").splitlines() == [
        "r.yaml:2:1: duplicate key 'a': it is already in line 1",
        "r.yaml:3:11: duplicate key 'c': it is already in line 3",
    ]


def test_an_alias_bomb_is_stopped() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "aliases (*name) multiply too far" in refused("\n".join(lines))


def test_an_alias_inside_itself_is_refused() -> None:
    assert "r.yaml" in refused("a: &x [*x]\n")


def test_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    root = parse_yaml(decode_utf8("\ufeffa: ə\r\nb: 2\r\n".encode(), "r.yaml"), "r.yaml")
    assert root.to_plain() == {"a": "ə", "b": 2}
    assert str(root.get("b").entry_location) == "r.yaml:2:1"  # type: ignore[union-attr]


def test_an_empty_file_is_nothing() -> None:
    assert parse_yaml("", "r.yaml").value is None
    assert parse_yaml("# only a comment\n", "r.yaml").value is None


def test_places_are_those_of_the_text() -> None:
    root = parse_yaml("a:\n  - {b: 1}\n  - c: two\n", "r.yaml")
    assert str(root.get("a", 1, "c").location) == "r.yaml:3:8"  # type: ignore[union-attr]
    assert str(root.get("a", 1, "c").entry_location) == "r.yaml:3:5"  # type: ignore[union-attr]
    assert str(root.find_nearest(("a", 0, "missing")).location) == "r.yaml:2:5"


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # no key of a recipe has such a character: the parser refuses it
KEYS = st.text().filter(lambda key: not CONTROL.search(key))
JSON = st.recursive(
    st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
# Text that YAML, or one of its many dialects, reads as something else.
TRICKY = st.sampled_from(
    [
        "no", "on", "~", "null", "true", "5_000", "2e-5", "1.", ".5", "1e5", "-", "- a", "a: b", "#x", "a #b", "'", '"', "${x}", "$${x}",
        "", " ", "\n", "a\n", "\na", " a\n b", "a\n\n", "\ta", "a\tb\nc", "2024-01-31", "!x", "&x", "*x", "<<", "=", "|", ">", "%", "@", "`",
        "\x85", "\u2028", "\ufeff", "\r", "a\r\nb", "\x00", "\x7f", "😀", "?", "? a", ":", "[", "{", "---", "...", "a\n---\nb", "0x1F", "010",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS | TRICKY.filter(lambda key: not CONTROL.search(key)), JSON | TRICKY | st.lists(TRICKY), max_size=5))
def test_what_is_written_is_read_back_the_same(data: dict[str, Any]) -> None:
    back = parse_yaml(to_yaml(data), "r.yaml").to_plain()
    assert back == data
    assert repr(back) == repr(data)  # 1 is not 1.0 and not True
