"""Limit the seconds that a regular expression of a recipe may take."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from azrecipe.errors import CommandError

PATTERN_SECONDS = 5.0  # for all names of a model; an ordinary pattern takes milliseconds


class TimeLimitError(Exception):
    """A block took longer than its limit."""


@contextmanager
def limit_seconds(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError in a block that takes longer.

    A regular expression looks for signals while it backtracks, so it ends too. Outside the main thread, which alone gets signals,
    there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise TimeLimitError

    handler = signal.signal(signal.SIGALRM, interrupt)
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, handler)


def match_names(pattern: str, names: Iterable[str], *, is_whole: bool) -> list[str]:
    """Return the names that a regular expression matches.

    Args:
        pattern: The regular expression.
        names: The names.
        is_whole: Whether it must match the whole name.

    Raises:
        CommandError: It is no regular expression, or takes longer than PATTERN_SECONDS.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CommandError(f"'{pattern}' is no regular expression: {error}") from None
    match = expression.fullmatch if is_whole else expression.search
    name = ""
    try:
        with limit_seconds(PATTERN_SECONDS):
            matched = []
            for name in names:
                if match(name):
                    matched.append(name)
            return matched
    except TimeLimitError:
        raise CommandError(
            f"'{pattern}' takes more than {PATTERN_SECONDS:g} seconds on the name {name}: it tries too many ways to match, "
            "as a repetition within a repetition does"
        ) from None
