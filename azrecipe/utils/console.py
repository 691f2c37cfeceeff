"""Output of commands: answers on stdout, all else on stderr."""

from __future__ import annotations

import re
import sys
from typing import TextIO

from azrecipe.errors import CommandError

# C0 but line breaks and tabs, DEL, C1, line and paragraph separators, marks, embeddings, overrides and isolates of bidirectional text,
# characters without width, and halves of surrogate pairs. Terminals take some for commands; others change what a line seems to say.
_CONTROL_CODES = (
    *range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), 0x061C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2060, 0x206A),
    *range(0xD800, 0xE000), 0xFEFF,
)  # fmt: skip
_ESCAPES = {code: f"\\u{code:04x}" for code in _CONTROL_CODES}
# The joiners U+200C and U+200D are part of words and emoji: of what is written with letters before the Hebrew ones they hide
_HIDDEN_JOINER = re.compile("(?:^|(?<=[\x00-\u058f\u200c\u200d]))[\u200c\u200d]")


def escape_controls(text: str) -> str:
    """Write control and invisible characters as `\\u001b`, which JSON and YAML read back.

    Keys, names, file names, rows and a model's text may hold any.
    """
    escaped = text.translate(_ESCAPES)
    return _HIDDEN_JOINER.sub(lambda match: f"\\u{ord(match[0]):04x}", escaped) if not escaped.isascii() else escaped


def print_progress(text: str, main: bool = True) -> None:
    """Print a line of progress on stderr, in the main process only."""
    if main:
        _write(sys.stderr, f"{escape_controls(text)}\n")


def print_line(text: object = "", end: str = "\n") -> None:
    """Print a line on stdout."""
    _write(sys.stdout, f"{escape_controls(str(text))}{end}")


def print_answer(text: str) -> None:
    """Print part of a model's answer on stdout, without a line break.

    Into a file or pipe it goes as it is. Joiners stay: a part may begin with one.
    """
    _write(sys.stdout, text.translate(_ESCAPES) if sys.stdout.isatty() else text)


def _write(stream: TextIO, text: str) -> None:
    """Write text at once; what the encoding lacks becomes question marks."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


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
