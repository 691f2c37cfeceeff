"""How commands speak: answers on stdout, all else on stderr."""

from __future__ import annotations

import sys

from azrecipe.errors import CommandError

CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def say(text: str, main: bool = True) -> None:
    """Print a line of progress on stderr, from one process."""
    if main:
        print(text, file=sys.stderr, flush=True)


def show(piece: str) -> None:
    """A piece of an answer, on stdout at once. What the terminal's encoding lacks becomes a question mark.

    A terminal gets no control characters but line breaks and tabs: a model may write any, and some are commands to a terminal.
    """
    if sys.stdout.isatty():
        piece = piece.translate(CONTROLS)
    try:
        print(piece, end="", flush=True)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        print(piece.encode(encoding, "replace").decode(encoding), end="", flush=True)


def check_text(text: str, what: str) -> None:
    """Raise CommandError for what came from the command line in another encoding than UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CommandError(f"{what} is not UTF-8") from None


def duration(seconds: float) -> str:
    """A time in words: 12 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
