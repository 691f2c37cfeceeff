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


def check_utf8(text: str, name: str) -> None:
    """Raise CommandError for a command-line value that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CommandError(f"{name} is not UTF-8") from None


def format_duration(seconds: float) -> str:
    """Format a duration: 12 s, 3:05 min, 2:10 h."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60}:{total % 60:02} min"
    return f"{total // 3600}:{total % 3600 // 60:02} h"


def format_bytes(size: float, digits: int = 1) -> str:
    """Format a size of memory: 512.0 MiB, 39.6 GiB.

    `digits` is the number of decimals of GiB.
    """
    return f"{size / 2**30:.{digits}f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def format_disk_size(size: float) -> str:
    """Format a size on disk: 12.3 GB."""
    return f"{size / 1e9:.1f} GB"
