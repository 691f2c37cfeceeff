"""Output of commands: answers on stdout, all else on stderr."""

from __future__ import annotations

import sys

from azrecipe.errors import CommandError

CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def print_progress(text: str, main: bool = True) -> None:
    """Print a line of progress on stderr, in the main process only."""
    if main:
        print(text, file=sys.stderr, flush=True)


def print_answer(text: str) -> None:
    """Print part of an answer on stdout, without a line break.

    Characters that the terminal's encoding lacks become question marks. A terminal gets no control characters but line
    breaks and tabs: a model may write any of them, and some are commands to a terminal.
    """
    if sys.stdout.isatty():
        text = text.translate(CONTROL_CHARACTERS)
    try:
        print(text, end="", flush=True)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def check_utf8(text: str, what: str) -> None:
    """Raise CommandError for a command-line value that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CommandError(f"{what} is not UTF-8") from None


def format_duration(seconds: float) -> str:
    """Format a duration: 12 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
