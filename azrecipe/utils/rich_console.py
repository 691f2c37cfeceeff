"""The console that tables are printed on."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from azrecipe.utils.console import escape_controls


class TerminalConsole(Console):
    """A console on stdout; text has no markup and no control characters.

    Names of files may hold square brackets, and a model's text anything.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string, a cell's or a title's too, into what is printed."""
        return super().render_str(escape_controls(text), **{**options, "markup": False, "emoji": False})


def open_console(width: int | None = 140) -> TerminalConsole:
    """Open a console on stdout.

    Without a terminal it is `width` columns wide; None: as wide as each line.
    """
    console = TerminalConsole(highlight=False, markup=False, emoji=False, soft_wrap=width is None)
    if console.is_terminal or width is None:
        return console
    return TerminalConsole(highlight=False, markup=False, emoji=False, width=width)
