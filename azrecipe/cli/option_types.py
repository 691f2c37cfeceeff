"""Types for argparse: numbers within bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from azrecipe.utils.console import escape_controls


def build_number_type(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Build a type for argparse: a number from `low` to `high`."""

    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a {'whole ' if kind is int else ''}number, not '{text}'") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be at least {low:g}" if high == float("inf") else f"must be from {low:g} to {high:g}")
        return value

    return parse_number


def parse_hours(text: str) -> float:
    """Parse a time for argparse: `24h`, `3d`, or hours without a unit."""
    units = {"h": 1.0, "d": 24.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        hours = float(number) * unit
    except ValueError:
        hours = 0.0
    if not 0 < hours < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a time, as in 24h or 3d, not '{text}'")
    return hours


parse_positive_int = build_number_type(int, 1, float("inf"))


class TerminalParser(argparse.ArgumentParser):
    """A parser whose messages hold no control characters of the command line."""

    def error(self, message: str) -> NoReturn:
        """End with a message, without control characters."""
        super().error(escape_controls(message))
