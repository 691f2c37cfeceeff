"""Count the steps, seconds and bytes that rendering a template takes.

One operation of Python, such as `==` or `in`, cannot be stopped. So no value may be so large that one takes long: each
value that a template makes is measured as a tree, in which a list that occurs twice counts twice. Between operations the
steps and the seconds are counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from threading import local

from jinja2 import TemplateError
from jinja2.utils import Namespace

MAX_BYTES = 2**26  # of what a template writes, and of each of its values
MAX_NUMBER = 2**24  # of characters or elements, as an argument
MAX_STEPS = 5_000_000  # passes of loops, calls and operations; a long value counts for several
MAX_SECONDS = 10.0
BYTES_PER_STEP = 512  # so all values of one rendering take at most some 2.5 GB together
ELEMENT_BYTES = 64  # that an element of a list counts, whatever it is
_budget = local()


class TemplateLimitError(TemplateError):
    """A template loops or grows beyond the limits."""


def refuse_template(what: str) -> None:
    raise TemplateLimitError(f"it {what}: it loops or grows without end")


def count_steps(steps: int) -> None:
    """Count work of the template that this thread renders."""
    if getattr(_budget, "depth", 0) == 0:
        return
    _budget.steps += steps
    if _budget.steps > MAX_STEPS:
        refuse_template(f"takes more than {MAX_STEPS:,} steps")
    if time.monotonic() > _budget.deadline:
        refuse_template(f"takes more than {MAX_SECONDS:g} seconds")


def check_size(size: float) -> None:
    """Count a value of so many bytes. Raises TemplateLimitError."""
    if size > MAX_BYTES:
        refuse_template(f"makes more than {MAX_BYTES:,} bytes")
    count_steps(1 + int(size) // BYTES_PER_STEP)


def measure_value(value: object) -> int:
    """Measure the bytes of a value and of all values within it.

    Where it is more than MAX_BYTES, any number above that.
    """
    return _walk(value)[0]


def _walk(value: object) -> tuple[int, bool]:
    """Return the bytes of a value, and whether it can change.

    Lists and dicts of a sandbox do not change unless a namespace is within them: their sizes are kept for the rendering.
    """
    if isinstance(value, str | bytes | int):
        return sys.getsizeof(value), False
    if isinstance(value, Namespace):
        elements: Iterable[object] = _list_attributes(value)
    elif isinstance(value, dict):
        elements = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        elements = value
    else:
        return ELEMENT_BYTES, False
    sizes: dict[int, tuple[object, int]] = getattr(_budget, "sizes", {})
    if id(value) in sizes:
        return sizes[id(value)][1], False
    size, can_change = ELEMENT_BYTES, isinstance(value, Namespace)
    for element in elements:
        element_size, element_can_change = _walk(element)
        size += max(ELEMENT_BYTES, element_size)
        can_change = can_change or element_can_change
        if size > MAX_BYTES:
            return size, True
    if not can_change:
        sizes[id(value)] = (value, size)  # with the value itself, so that its id is not used again
    return size, can_change


def _list_attributes(namespace: Namespace) -> list[object]:
    """Return the values of a namespace."""
    attributes: dict[str, object] = namespace._Namespace__attrs
    return list(attributes.values())


def check_values(arguments: Iterable[object]) -> None:
    """Refuse values that are too large, and numbers that would make one."""
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_NUMBER:
            refuse_template(f"uses a number above {MAX_NUMBER:,} for a length")
        if measure_value(argument) > MAX_BYTES:
            refuse_template(f"makes more than {MAX_BYTES:,} bytes")


class Budget:
    """The steps and seconds of one rendering in this thread."""

    def __enter__(self) -> None:
        _budget.depth = getattr(_budget, "depth", 0) + 1
        if _budget.depth == 1:
            _budget.steps, _budget.deadline, _budget.sizes = 0, time.monotonic() + MAX_SECONDS, {}

    def __exit__(self, _class: object, error: BaseException | None, _frames: object) -> None:
        _budget.depth -= 1
        if _budget.depth == 0:
            _budget.sizes = {}
        if isinstance(error, RecursionError):
            raise TemplateLimitError("it calls itself without end") from None
        if isinstance(error, MemoryError):
            raise TemplateLimitError("it needs more memory than there is: it loops or grows without end") from None
