"""Render Jinja templates of strangers: sandboxed, in bounded time and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from threading import local
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 2**24  # of what a template writes, and of each of its strings and lists
MAX_STEPS = 5_000_000  # passes of loops, calls and operations; a long string counts for several
MAX_SECONDS = 10.0
CHARACTERS_PER_STEP = 4_096
MAX_DIGITS = 6  # of a number in a format: '%9999999d' would write megabytes
_budget = local()


class TemplateLimitError(TemplateError):
    """A template loops or grows beyond the limits."""


def _refuse(what: str) -> None:
    raise TemplateLimitError(f"it {what}: it loops or grows without end")


def _count_steps(steps: int) -> None:
    """Count work of the template that this thread renders."""
    if getattr(_budget, "depth", 0) == 0:
        return
    before = _budget.steps
    _budget.steps = before + steps
    if _budget.steps > MAX_STEPS:
        _refuse(f"takes more than {MAX_STEPS:,} steps")
    if before >> 8 != _budget.steps >> 8 and time.monotonic() > _budget.deadline:
        _refuse(f"takes more than {MAX_SECONDS:g} seconds")


def _check_size(size: float) -> None:
    """Count a string or list of this size. Raises TemplateLimitError."""
    if size > MAX_CHARACTERS:
        _refuse(f"makes more than {MAX_CHARACTERS:,} characters")
    _count_steps(1 + int(size) // CHARACTERS_PER_STEP)


def _measure(value: object) -> int:
    """Return the length of a string or list, else 0."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _check_arguments(arguments: Iterable[object]) -> None:
    """Refuse numbers that would make a string or list too long."""
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_CHARACTERS:
            _refuse(f"uses a number above {MAX_CHARACTERS:,} for a length")


def _check_format(text: object, values: object = ()) -> None:
    """Refuse a format that pads to a great length."""
    if isinstance(text, str) and (re.search(rf"\d{{{MAX_DIGITS},}}", text) or "*" in text or "{" in text):
        _check_arguments(values if isinstance(values, tuple | list) else [values])
        if re.search(rf"\d{{{MAX_DIGITS},}}", text):
            _refuse("pads text to a great length")


def _multiply(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple | bytes) and isinstance(other, int):
            _check_size(len(one) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_size((left.bit_length() + right.bit_length()) / 8)
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        _check_size(left.bit_length() * right / 8 * 1_000)  # powers are slow
    return left**right


def _add(left: Any, right: Any) -> Any:
    _check_size(_measure(left) + _measure(right))
    return left + right


def _format(left: Any, right: Any) -> Any:
    _check_format(left, right)
    return left % right


def _join_parts(parts: Iterable[str]) -> str:
    """Join strings while their length stays within the limit."""
    pieces, size = [], 0
    for part in parts:
        pieces.append(part)
        size += len(part)
        if size > MAX_CHARACTERS:
            _check_size(size)
    _check_size(size)
    return "".join(pieces)


def _concatenate(values: Iterable[object]) -> str:
    """Evaluate `a ~ b`."""
    return _join_parts(map(str, values))


def _limit_iteration(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what a `for` goes through, each a step."""
    for value in values:
        _count_steps(1)
        yield value


def _limit_method(method: Any, arguments: tuple[Any, ...]) -> None:
    """Refuse a call of a string's method whose result would be too long."""
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str):
        return
    if name == "replace" and len(arguments) >= 2 and all(isinstance(each, str) for each in arguments[:2]):
        _check_size(len(text) + text.count(arguments[0]) * len(arguments[1]))
    elif name == "join" and arguments and isinstance(arguments[0], list | tuple):
        _check_size(len(text) * len(arguments[0]) + sum(map(_measure, arguments[0])))
    elif name in ("translate", "expandtabs"):
        largest = max(
            (each if isinstance(each, int) else max(map(_measure, each.values()), default=0) if isinstance(each, dict) else 1)
            for each in (*arguments, 8)
        )
        _check_size(len(text) * largest)


def _limit_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter, so that its numbers and its result are limited."""

    @wraps(function)
    def limited(*arguments: Any, **options: Any) -> Any:
        values = (*arguments, *options.values())
        _check_arguments(values)
        if name == "format":
            _check_format(next((each for each in arguments if isinstance(each, str)), None), values)
        if name == "replace":
            texts = [each for each in arguments if isinstance(each, str)]
            if len(texts) >= 3:
                _limit_method(texts[0].replace, tuple(texts[1:3]))
        if name in ("indent", "tojson"):
            widths = [each if isinstance(each, int) else len(each) for each in values[1:] if isinstance(each, int | str)]
            _check_size(max(map(_measure, arguments), default=0) * max(widths, default=1))
        result = function(*arguments, **options)
        _check_size(_measure(result))
        return result

    return limited


class LimitedTemplate(Template):
    """A template whose rendering is counted."""

    def generate(self, *arguments: Any, **variables: Any) -> Iterator[str]:
        """Render piece by piece. Raises TemplateLimitError."""
        size = 0
        with _Budget():
            for piece in super().generate(*arguments, **variables):
                size += len(piece)
                _check_size(size if size > MAX_CHARACTERS else len(piece))
                yield piece

    def render(self, *arguments: Any, **variables: Any) -> str:
        """Render at once. Raises TemplateLimitError."""
        with _Budget():
            return super().render(*arguments, **variables)


class _Budget:
    """The steps and seconds of one rendering in this thread."""

    def __enter__(self) -> None:
        _budget.depth = getattr(_budget, "depth", 0) + 1
        if _budget.depth == 1:
            _budget.steps, _budget.deadline = 0, time.monotonic() + MAX_SECONDS

    def __exit__(self, _class: object, error: BaseException | None, _frames: object) -> None:
        _budget.depth -= 1
        if isinstance(error, RecursionError):
            raise TemplateLimitError("it calls itself without end") from None
        if isinstance(error, MemoryError):
            raise TemplateLimitError("it needs more memory than there is: it loops or grows without end") from None


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end: steps, seconds and lengths are limited.

    Catastrophic regular expressions of filters that others add are not limited.
    """

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    template_class = LimitedTemplate
    concat = staticmethod(_join_parts)

    def limit(self) -> None:
        """Put limits around the operators and filters that are there now."""
        self.binop_table = {**self.binop_table, "*": _multiply, "**": _power, "+": _add, "%": _format}
        self.filters = {name: _limit_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"_limit_iteration": _limit_iteration, "_concatenate": _concatenate}

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        _count_steps(1)
        _check_arguments((*args, *kwargs.values()))
        _limit_method(__obj, args)
        result = super().call(__context, __obj, *args, **kwargs)
        _check_size(_measure(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Wrap a string's format method."""
        wrapper: Callable[..., str] | None = super().wrap_str_format(value)
        if wrapper is None:
            return None
        return partial(self._call_format, value.__self__, wrapper)

    def _call_format(self, text: str, wrapper: Callable[..., str], *values: Any, **named: Any) -> str:
        _check_format(text, (*values, *named.values()))
        return wrapper(*values, **named)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        """Compile, with counted loops and concatenations."""
        for loop in list(source.find_all(nodes.For)):
            loop.iter = _to_filter(loop.iter, "_limit_iteration", self)
        for node in [source, *source.find_all(nodes.Node)]:
            for name, value in list(node.iter_fields()):
                if isinstance(value, nodes.Concat):
                    setattr(node, name, _to_filter(_to_list(value), "_concatenate", self))
                elif isinstance(value, list):
                    value[:] = [
                        _to_filter(_to_list(each), "_concatenate", self) if isinstance(each, nodes.Concat) else each for each in value
                    ]
        return super()._generate(source, *arguments, **options)


def _to_list(node: nodes.Concat) -> nodes.List:
    return nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)


def _to_filter(node: Any, name: str, environment: Environment) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=environment)


def limit_chat_templates() -> None:
    """Limit the chat templates that transformers renders in this process."""
    from functools import lru_cache

    from transformers.utils import chat_template_utils

    compile_template = chat_template_utils._cached_compile_jinja_template
    if getattr(chat_template_utils._compile_jinja_template, "is_limited", False):
        return

    @lru_cache
    def compile_limited(chat_template: str) -> Template:
        environment = compile_template("").environment  # nothing of the template is run before its limits are there
        environment.__class__ = LimitedEnvironment
        environment.limit()
        template: Template = environment.from_string(chat_template)
        return template

    compile_limited.is_limited = True  # type: ignore[attr-defined]
    chat_template_utils._compile_jinja_template = compile_limited
