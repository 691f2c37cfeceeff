"""No control character of a key, name, row, file name or model reaches a terminal."""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from azrecipe.cli.check_preview import format_example
from azrecipe.operations.check_preview import ExamplePreview, TokenSpan
from azrecipe.report import terminal_tables
from azrecipe.utils.console import escape_controls, print_answer, print_line, print_progress
from azrecipe.utils.rich_console import TerminalConsole, open_console
from tests.conftest import Done, jsonl, write
from tests.unit.recipe.test_secrets import RECIPE

HOSTILE = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;title\x07",
    "link": "\x1b]8;;http://x\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "c1": "\x9b2J\x90q",
    "return": "all is well\rnot",
    "bell and back": "a\x07b\x08\x7f",
    "override": "\u202egnp.exe",
    "isolate": "\u2066\u2069\u202a\u202c",
    "separator": "a\u2028b\u2029c",
    "surrogate": "a\udc80b",
    "direction marks": "\u200e\u200fa\u061c",
    "without width": "a\u200bb\u2060c\ufeffd\u2061\u2064",
    "joiners between Latin letters": "\u200ca\u200db\u200c\u200dc",
}
ORDINARY = "Kənd 😀 ağ\tçay\nŋ [bold]x[/bold] tr[a-z]in.txt :smile: سلام می\u200cخواهم 👩\u200d🌾 क्\u200dष"


INVISIBLE = {*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x206A), 0x061C, 0xFEFF}


def assert_clean(text: str, allowed: str = "\n\t") -> None:
    controls = [c for c in text if c not in allowed and (unicodedata.category(c) in ("Cc", "Cs") or ord(c) in INVISIBLE)]
    assert not controls, text


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", HOSTILE)
def test_every_way_of_printing_escapes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    print_answer(HOSTILE[kind])
    assert_clean(stream.getvalue(), "\n\t\u200c\u200d")
    stream.truncate(0)
    print_progress(HOSTILE[kind])
    print_line(HOSTILE[kind])
    assert_clean(stream.getvalue().lstrip("\0"))
    stream.truncate(0)
    table = Table(HOSTILE[kind], title=HOSTILE[kind], caption=HOSTILE[kind])
    table.add_row(HOSTILE[kind])
    console = TerminalConsole(file=stream, highlight=False, markup=False, force_terminal=False)
    console.print(table)
    console.print(HOSTILE[kind])
    console.print(format_example(ExamplePreview("", (TokenSpan((HOSTILE[kind],), True),), 0), False))
    assert_clean(stream.getvalue().lstrip("\0"))


def test_ordinary_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert escape_controls(ORDINARY) == ORDINARY
    open_console(200).print(ORDINARY)
    assert capsys.readouterr().out.split() == ORDINARY.split()
    print_line(ORDINARY)
    assert capsys.readouterr().out == f"{ORDINARY}\n"


def test_an_escape_is_read_back_by_json() -> None:
    for text in HOSTILE.values():
        assert json.loads(escape_controls(json.dumps(text, ensure_ascii=False))) == text


def test_an_answer_goes_into_a_pipe_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(HOSTILE["colour"])
    assert capsys.readouterr().out == HOSTILE["colour"]


def test_what_an_encoding_lacks_becomes_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_line("ağ")
    assert stream.buffer.getvalue() == b"a?\n"  # type: ignore[attr-defined]


ESC = '"\\e[31m\\e]0;t\\a\\x9b2J\\u202e"'  # in YAML
RECIPES = {
    "key of two lines": RECIPE.format("x") + '"a\\nb.yaml:1:1: all is well": 1\n',
    "extends of two lines": 'extends: "a\\nb.yaml:1:1: all is well.yaml"\n',
    "key without width": RECIPE.format("x") + '"a\\u200Bb": 1\n',
    "key": RECIPE.format("x") + f"{ESC}: 1\n",
    "stage": f"stage: {ESC}\n",
    "value": RECIPE.format("x").replace("precision: float32", f"precision: {ESC}"),
    "extends": f"extends: {ESC}\n",
    "variable": RECIPE.format('"${a}"') + f"variables: {{{ESC}: 1}}\n",
    "unknown variable": RECIPE.format('"${\\e[31m}"'),
    "file": RECIPE.format("x").replace("path: text.txt", 'path: "\\e[31m\\u202etext.txt"'),
    "column": RECIPE.format("x").replace("{path: text.txt}", f"{{path: text.jsonl, text_column: {ESC}}}"),
    "phase": RECIPE.format("x").replace("name: all", f"name: {ESC}"),
    "pattern": RECIPE.format("x").replace("trainable_parameters: [all]", f"trainable_parameters: [{ESC}]"),
    "model": RECIPE.format("x").replace("model_type: llama", f"model_type: {ESC}"),
}


@pytest.mark.parametrize("verb", ["validate"])
@pytest.mark.parametrize("kind", sorted(RECIPES.keys() - {"column", "file", "model", "pattern"}))
def test_messages_about_recipes_are_clean(kind: str, verb: str, project: Path, cli: Callable[..., Done]) -> None:
    write("recipe.yaml", RECIPES[kind])
    done = cli(verb, "recipe.yaml")
    assert done.code and done.text
    assert_clean(done.text)
    assert not any(line.startswith("b.yaml") for line in done.text.splitlines())


@pytest.mark.parametrize("kind", ["column", "file", "model"])
def test_messages_about_data_and_models_are_clean(kind: str, project: Path, cli: Callable[..., Done]) -> None:
    write("recipe.yaml", RECIPES[kind])
    done = cli("check", "recipe.yaml")
    assert done.code and "Traceback" not in done.text
    assert_clean(done.text)


def test_names_on_the_command_line_and_in_folders_are_clean(project: Path, cli: Callable[..., Done]) -> None:
    for arguments in (
        ["\x1b[31m"],
        ["run", "\x1b[31m.yaml"],
        ["validate", "\x1b[31m"],
        ["run", "a.yaml", "--\x1b[31m"],
        ["report", "\x1b]8;;x\x07"],
    ):
        done = cli(*arguments)
        assert done.code
        assert_clean(done.text)
    write("\x1b[31mrecipe.yaml", RECIPE.format("x"))
    assert_clean(cli("validate", ".").text)


def test_the_table_of_an_evaluation_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE.values():
        model = {"parameters": 1, "samples": [{"output": f"{text} tr[a-z]in.txt"}], "bpb": {}, "fertility": {}, "bytes_per_token": {}}
        terminal_tables._print_evaluate(
            {"models": {text: model}, "definitions": {"bpb": ""}, "prompts": [text], "validation": []}, title=text
        )
        printed = capsys.readouterr().out
        assert_clean(printed)
        assert "tr[a-z]in.txt" in printed


def test_rows_with_roles_are_clean(project: Path, cli: Callable[..., Done]) -> None:
    write("questions.jsonl", jsonl({"messages": [{"role": "\x1b[31m\u202e", "content": "x"}]}))
    write("sft.yaml", "stage: sft\nproject: p\nmodel: {name_or_path: ./llama}\nchat_template: llama3\ndata: {max_length: 64, datasets: [{path: questions.jsonl}]}\n"
          "training: {learning_rate: 1e-2, max_steps: 1, global_batch_size: 1, per_device_train_batch_size: 1, precision: float32}\n")  # fmt: skip
    done = cli("check", "sft.yaml")
    assert done.code
    assert_clean(done.text)


def test_rich_text_is_not_made_from_markup() -> None:
    assert TerminalConsole(markup=True).render_str("[red]x[/red]").plain == "[red]x[/red]"
