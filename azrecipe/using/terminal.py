"""Knows how these verbs speak: what was asked for on stdout, all else on stderr, and no character that an encoding lacks ends them."""

from __future__ import annotations

import sys

from azrecipe.errors import CommandError

CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def say(text: str) -> None:
    """A line about what happens, on stderr."""
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
