"""Say what to write where a file is not valid YAML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import yaml

_KEY_WITHOUT_SPACE = re.compile(r"\s*(- )?([\w.-]+):(?=[^\s:/\\])")
_PLAIN_SPACES = " \t\n\r"


@dataclass(frozen=True)
class SyntaxProblem:
    """What is wrong with a file, and its line and column, from 0."""

    line: int
    column: int
    message: str


class _Report:
    """A syntax error of PyYAML beside the lines of the file."""

    def __init__(self, error: yaml.MarkedYAMLError, text: str) -> None:
        self.context, self.problem = error.context or "", error.problem or ""
        self.lines = re.split(r"\r\n|\n|\r|\x85|\u2028|\u2029", text)
        mark = error.problem_mark or error.context_mark
        self.line, self.column = (mark.line, mark.column) if mark else (0, 0)
        start = error.context_mark or mark
        self.start_line, self.start_column = (start.line, start.column) if start else (0, 0)
        match = re.search(r"(?:found|got) (?:character )?'(.*?)'(?:$| that)", self.problem.replace("'\\t'", "'\t'"))
        self.token = match[1] if match else ""

    def at(self, message: str) -> SyntaxProblem:
        """Return the problem at the place that PyYAML names."""
        return SyntaxProblem(self.line, self.column, message)

    def at_start(self, message: str) -> SyntaxProblem:
        """Return the problem at the start of what PyYAML was reading."""
        return SyntaxProblem(self.start_line, self.start_column, message)

    def get_line(self, number: int) -> str:
        return self.lines[number] if 0 <= number < len(self.lines) else ""

    def find_line_above(self) -> int:
        """Return the last line above that has text."""
        return next((n for n in range(self.line - 1, -1, -1) if self.get_line(n).split("#")[0].strip()), 0)


def describe_syntax_error(error: yaml.MarkedYAMLError, text: str) -> SyntaxProblem:
    """Return what to write instead, and where."""
    report = _Report(error, text)
    line = report.get_line(report.line)
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return report.at("a tab in the indentation: YAML wants spaces")
    if report.token == "\t":
        return report.at("a tab between key and value: YAML wants a space")
    for start, describe in _DESCRIPTIONS:
        if report.context.startswith(start) or report.problem.startswith(start):
            return describe(report)
    return report.at(f"not valid YAML: {'; '.join(part for part in (report.context, report.problem) if part)}")


def _describe_brackets(report: _Report) -> SyntaxProblem:
    """Describe a list or mapping in brackets that goes wrong."""
    opening, closing = (
        ("[", "]") if "sequence" in report.context or report.get_line(report.start_line)[report.start_column :][:1] == "[" else ("{", "}")
    )
    if "node" in report.context and report.token == "<stream end>":
        return report.at("the text ends inside a list or a mapping: close it with ] or }")
    if "node" in report.context:
        return report.at(f"a value is missing before this '{report.token}': write the value, or remove the comma")
    if report.token in ("]", "}"):
        return report.at(f"'{opening}' in line {report.start_line + 1} is closed by '{report.token}': write '{closing}'")
    if report.line > report.start_line or not report.token or report.token == "<stream end>":
        return report.at_start(
            f"'{opening}' is not closed: write '{closing}' at the end of the list"
            if opening == "["
            else f"'{opening}' is not closed: write '{closing}' at the end of the mapping"
        )
    if report.token == ":":
        return report.at(f"a colon in unquoted text inside {opening} {closing}: quote the text, as in 'a: b'")
    if report.get_line(report.line)[report.column - 1 : report.column + 1] == "${":
        return SyntaxProblem(report.line, report.column - 1, "a variable inside { } or [ ]: quote it, as in '${name}'")
    return report.at(f"'{report.token}' in unquoted text inside {opening} {closing}: quote the text, as in 'a{report.token}b'")


def _describe_block(report: _Report) -> SyntaxProblem:
    """Describe lines that do not fit together."""
    start = report.start_line + 1
    if report.token in ("]", "}"):
        return report.at(
            f"'{report.token}' closes nothing: there is no '{'[' if report.token == ']' else '{'}' before it. Remove it, or quote the text"
        )
    if report.token in ("<block mapping start>", "<block sequence start>"):
        what = "key" if "mapping" in report.token else "'-'"
        return report.at(
            f"this {what} is not in line with what it belongs to: indent it by as many spaces as line {start}, or as the lines above"
        )
    if report.token in ("-", "<block entry>"):
        return report.at(f"a list element among the keys that begin in line {start}: indent it below the key that it belongs to")
    if report.token == "?" and "collection" in report.context:
        return report.at(
            f"a key among the list elements that begin in line {start}: begin it with '- ', or end the indentation of the list"
        )
    if report.token == ":":
        return report.at("no key stands before this colon: write key: value")
    if not report.get_line(report.line)[: report.column].strip():
        return report.at("text that belongs to no key: write key: value, or quote the whole text of the value above")
    return report.at(
        "text behind a quoted text or a bracket: quote the whole value; an apostrophe inside '…' is written twice, as in 'it''s'"
    )


def _describe_colon(report: _Report) -> SyntaxProblem:
    """Describe a colon that cannot make a key."""
    before = report.get_line(report.line)[: report.column]
    if re.search(r":\s", before):
        return report.at("a colon followed by a space in unquoted text: quote the value, as in description: 'a: b'")
    number = report.find_line_above()
    above = report.get_line(number)
    if (match := _KEY_WITHOUT_SPACE.match(above)) is not None:
        return SyntaxProblem(number, match.end() - 1, f"no space behind this colon: write {match[2]}: {above[match.end() :].strip()}")
    if len(before) > 128:
        return report.at("a key of more than 1,024 characters")
    if len(above) - len(above.lstrip()) < len(before) - len(before.lstrip()):
        return report.at(
            f"line {number + 1} has a value, so no keys can stand below it: indent this key by as many spaces, or remove that value"
        )
    return _describe_missing_colon(above, number, len(above) - len(above.lstrip()))


def _describe_missing_colon(text: str, line: int, column: int) -> SyntaxProblem:
    """Describe a line without a colon and a space behind it."""
    for match in re.finditer(r":(\S|[^\S \t])", text):
        if (character := find_invisible_character(match[1])) is not None:
            message = f"behind this colon stands the invisible character {character}: write a space instead"
            return SyntaxProblem(line, match.start(), message)
    return SyntaxProblem(line, column, "no colon in this line: write key: value")


def _describe_quote(report: _Report) -> SyntaxProblem:
    if "escape" in report.problem or "escape" in report.context:
        return report.at("a backslash begins an escape inside \"…\": write single quotes, as in 'C:\\data', or two backslashes")
    quote = report.get_line(report.start_line)[report.start_column :][:1] or "'"
    return report.at_start(f"this quoted text is not closed: write {quote} at its end")


def _describe_special_character(report: _Report) -> SyntaxProblem:
    line, column = (
        (report.line, report.column)
        if "character" in report.problem and "next token" in report.context
        else (report.start_line, report.start_column)
    )
    rest = report.get_line(line)[column:]
    word = re.split(r"[\s,\]}]", rest)[0] or rest[:1]
    return SyntaxProblem(line, column, f"unquoted text cannot begin with '{rest[:1]}': quote it, as in '{word}'")


def _describe_alias(report: _Report) -> SyntaxProblem:
    name = re.sub(r".*'(.*)'.*", r"\1", report.problem)
    return report.at(f"*{name} is the value of an anchor &{name}, and there is none above: write '*{name}' in quotes if it is text")


def _describe_duplicate_anchor(report: _Report) -> SyntaxProblem:
    name = report.context.partition("'")[2].partition("'")[0] or report.problem.partition("'")[2].partition("'")[0]
    return report.at(f"the anchor &{name} is already in line {report.start_line + 1}: give one of them another name")


def _describe_documents(report: _Report) -> SyntaxProblem:
    number = report.line if report.get_line(report.line).startswith(("---", "...")) else report.find_line_above()
    return SyntaxProblem(
        number, 0, "a second document begins here, and a file has one: remove the line, or move what follows to another file"
    )


_DESCRIPTIONS: tuple[tuple[str, Callable[[_Report], SyntaxProblem]], ...] = (
    ("while parsing a flow", _describe_brackets),
    ("while parsing a block", _describe_block),
    ("mapping values are not allowed", _describe_colon),
    ("while scanning a quoted scalar", _describe_quote),
    ("while scanning a double-quoted scalar", _describe_quote),
    ("while scanning a simple key", lambda report: _describe_missing_colon(report.get_line(report.start_line), report.start_line, report.start_column)),
    ("while scanning a directive", lambda report: SyntaxProblem(report.start_line, 0, "a line cannot begin with '%': quote the text, or put a key before it")),
    ("while scanning for the next token", _describe_special_character),
    ("while scanning an anchor", _describe_special_character),
    ("while scanning an alias", _describe_special_character),
    ("while scanning a tag", _describe_special_character),
    ("while parsing a tag", _describe_special_character),
    ("while scanning a block scalar", lambda report: SyntaxProblem(report.line, report.start_column, "'|' and '>' begin a text of several lines, which stands below them: begin it in the next line, or quote the text")),
    ("found undefined alias", _describe_alias),
    ("found duplicate anchor", _describe_duplicate_anchor),
    ("sequence entries are not allowed here", lambda report: report.at("a list cannot begin behind a key in one line: begin it in the next line, or write [a, b]")),
    ("expected a single document", _describe_documents),
    ("expected '<document start>'", _describe_documents),
)  # fmt: skip


def find_invisible_character(text: str) -> str | None:
    """Name the first character that looks like a space or like nothing."""
    for character in text:
        if character not in _PLAIN_SPACES and unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cf"):
            return f"U+{ord(character):04X} ({unicodedata.name(character, 'a format character').lower()})"
    return None
