"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console


def build_console(width: int) -> Console:
    """Build a console on stdout, `width` columns wide without a terminal.

    Markup is off: names of files may contain square brackets.
    """
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=width)
