"""A file that is no YAML: each message says what to write instead, at the place where it is to be written."""

from __future__ import annotations

import random

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.yaml_tree import parse_yaml
from tests.conftest import ROOT

CASES = {
    "a list that is not closed": ("steps: [a\nproject: p\n", "1:8: '[' is not closed: write ']' at the end of the list"),
    "a list at the end of the file": ("steps: [a, b", "1:8: '[' is not closed"),
    "a mapping that is not closed": ("data: {a: 1\nproject: p\n", "1:7: '{' is not closed: write '}' at the end of the mapping"),
    "closed by the other bracket": ("data: {a: [1, 2}\n", "1:16: '[' in line 1 is closed by '}': write ']'"),
    "closed twice": ("data: [1]]\n", "1:10: ']' closes nothing: there is no '[' before it"),
    "a single quote": ("project: 'open\nb: 1\n", "1:10: this quoted text is not closed: write ' at its end"),
    "a double quote": ('project: "open\nb: 1\n', '1:10: this quoted text is not closed: write " at its end'),
    "a backslash": ('path: "C:\\Users\\x"\n', "1:12: a backslash begins an escape"),
    "an apostrophe": ("a: 'it's'\n", "1:8: text behind a quoted text or a bracket: quote the whole value; an apostrophe"),
    "text behind a bracket": ("a: [x] y\n", "1:8: text behind a quoted text or a bracket"),
    "a colon in a value": ("description: a: b\n", "1:15: a colon followed by a space in unquoted text: quote the value"),
    "a colon in a list": ("a: [b: c: d]\n", "1:9: a colon in unquoted text inside [ ]: quote the text"),
    "a colon in a mapping": ("a: {b: c: d}\n", "1:9: a colon in unquoted text inside { }: quote the text"),
    "no space behind a colon": ("project:p\nseed: 1\n", "1:8: no space behind this colon: write project: p"),
    "no colon": ("a: 1\nproject\nc: 2\n", "2:1: no colon in this line: write key: value"),
    "no colon in the first line": ("project\nc: 2\n", "1:1: no colon in this line"),
    "no key": (": 1\n", "1:1: no key stands before this colon"),
    "a percent sign": ("%p: 1\n", "1:1: a line cannot begin with '%'"),
    "an at sign": ("path: @x\n", "1:7: unquoted text cannot begin with '@': quote it, as in '@x'"),
    "a backtick": ("path: `x`\n", "1:7: unquoted text cannot begin with '`'"),
    "a glob": ("path: *.jsonl\n", "1:7: unquoted text cannot begin with '*': quote it, as in '*.jsonl'"),
    "a glob in a mapping": ("a: {path: *.txt}\n", "1:11: unquoted text cannot begin with '*': quote it, as in '*.txt'"),
    "an ampersand": ("a: & x\n", "1:4: unquoted text cannot begin with '&'"),
    "an alias of nothing": ("a: *x\n", "1:4: *x is the value of an anchor &x, and there is none above"),
    "an anchor twice": ("a: &x 1\nb: &x 2\n", "2:4: the anchor &x is already in line 1: give one of them another name"),
    "a tag": ("path: !x y\n", "the tag !x is not allowed in a recipe: quote the value if it is text"),
    "text behind a bar": ("a: |x\n  b\n", "1:4: '|' and '>' begin a text of several lines"),
    "indented less": ("a:\n  b: 1\n c: 2\n", "3:2: this key is not in line with what it belongs to"),
    "indented more": ("a: 1\n  b: 2\n", "2:4: line 1 has a value, so no keys can stand below it"),
    "a list indented less": ("a:\n  - b\n - c\n", "3:2: this '-' is not in line with what it belongs to"),
    "an element among keys": ("a: 1\n- b\n", "2:1: a list element among the keys that begin in line 1"),
    "a key among elements": ("- a\nb: 1\n", "2:1: a key among the list elements that begin in line 1"),
    "a list behind a key": ("a: - b\n", "1:4: a list cannot begin behind a key in one line"),
    "a tab": ("a:\n\tb: 1\n", "2:1: a tab in the indentation: YAML wants spaces"),
    "a tab behind a key": ("a:\t1\n", "1:3: a tab between key and value"),
    "two documents": ("a: 1\n---\nb: 2\n", "2:1: a second document begins here, and a file has one"),
    "three dots": ("a: 1\n...\nb: 2\n", "2:1: a second document begins here"),
    "two commas": ("a: [1,,2]\n", "1:7: a value is missing before this ','"),
    "a template": ("a: {{ x }}\n", "1:5: a key must be text: quote {{ … }}"),
    "a variable in a mapping": ("a: {b: ${x}}\n", "1:8: a variable inside { } or [ ]: quote it, as in '${name}'"),
    "an expression in a list": ("a: [layers.[0-9]+]\n", "1:12: '[' in unquoted text inside [ ]: quote the text"),
    "a long key": (f"{'x' * 1100}: 1\n", "a key of more than 1,024 characters"),
    "a byte-order mark within": ("a: 1\n\ufeffb: 2\n", "2:1: a key with the invisible character U+FEFF"),
    "a no-break space behind a colon": (
        "a: 1\nb:\u00a02\nc: 3\n",
        "2:2: behind this colon stands the invisible character U+00A0 (no-break space): write a space",
    ),
    "a zero-width space behind a colon": ("a: 1\nb:\u200b2\nc: 3\n", "2:2: behind this colon stands the invisible character U+200B"),
    "a key of two lines": ('"a\\nb": 1\n', '1:1: a key with a line break or another control character: "a\\nb"'),
    "a no-break space": ("a:\n\u00a0\u00a0b: 1\n", "2:1: a key with the invisible character U+00A0 (no-break space)"),
    "a control character": ("a: \x07\n", "1:4: the character U+0007 is not allowed in YAML"),
}


def refuse(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(("text", "message"), CASES.values(), ids=list(CASES))
def test_what_to_write_instead(text: str, message: str) -> None:
    told = refuse(text)
    assert message in told
    assert told.startswith(("r.yaml:1:", f"r.yaml:{message[0]}:"))
    for word in ("<block", "expected", "while ", "token"):
        assert word not in told


def test_no_file_that_loses_a_character_ends_in_words_of_the_parser() -> None:
    """Each shipped recipe with one character away, or one put in: read, or refused in words of ours at a place in the file."""
    generator = random.Random(0)
    refused = 0
    for file in sorted((ROOT / "recipes").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        for _ in range(12):
            place = generator.randrange(len(text))
            broken = (
                text[:place]
                + generator.choice(["", "", "[", "]", "{", "'", '"', ":", "\t", "- ", "%", "&", "*", "!", "\n", "|", "@"])
                + text[place + 1 :]
            )
            try:
                parse_yaml(broken, "r.yaml")
            except RecipeError as error:
                refused += 1
                assert "not valid YAML: while" not in str(error) and "<block" not in str(error), (str(error), broken)
                assert all(0 < problem.location.line <= broken.count("\n") + 1 for problem in error.problems)
    assert refused > 100
