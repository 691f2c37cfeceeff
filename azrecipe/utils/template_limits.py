"""Render Jinja templates of strangers: sandboxed, in bounded time and memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from azrecipe.utils.template_budget import (
    ELEMENT_BYTES,
    MAX_BYTES,
    Budget,
    check_size,
    check_values,
    count_steps,
    measure_value,
    refuse_template,
)

MAX_DIGITS = 6  # of a number in a format: '%9999999d' would write megabytes
MAX_TEMPLATE_CHARACTERS = 2**20  # the largest published ones have some 30,000
# Filters whose cost does not depend on what is within the elements of a list
SHALLOW_FILTERS = frozenset(
    ("length", "count", "first", "last", "default", "d", "map", "select", "reject", "selectattr", "rejectattr", "list", "batch", "slice")
)
QUADRATIC_FILTERS = frozenset(("wordwrap", "urlize", "striptags", "pprint"))


def _check_format(text: object, values: object = ()) -> None:
    """Refuse a format that pads to a great length, or repeats great values."""
    if not isinstance(text, str):
        return
    check_size(len(text) + (text.count("%") + text.count("{")) * measure_value(values))
    if re.search(rf"\d{{{MAX_DIGITS},}}", text):
        refuse_template("pads text to a great length")
    if "*" in text or "{" in text:
        check_values(values if isinstance(values, tuple | list) else [values])


def _multiply(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple | bytes) and isinstance(other, int):
            check_size(measure_value(one) * max(other, 0))
    if isinstance(left, int) and isinstance(right, int):
        check_size((left.bit_length() + right.bit_length()) / 8 * 1_000)  # products and powers are slow
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        check_size(left.bit_length() * right / 8 * 1_000)
    return left**right


def _add(left: Any, right: Any) -> Any:
    check_size(measure_value(left) + measure_value(right))
    return left + right


def _format(left: Any, right: Any) -> Any:
    _check_format(left, right)
    return left % right


def _join_parts(parts: Iterable[str]) -> str:
    """Join strings while their length stays within the limit."""
    pieces, size = [], 0
    for part in parts:
        pieces.append(part)
        size += sys.getsizeof(part)
        if size > MAX_BYTES:
            check_size(size)
    check_size(size)
    return "".join(pieces)


def _concatenate(values: Iterable[object]) -> str:
    """Evaluate `a ~ b`."""
    return _join_parts(map(str, values))


def _limit_iteration(values: Iterable[Any]) -> Iterator[Any]:
    """Yield what a `for` goes through, each a step."""
    for value in values:
        count_steps(1)
        yield value


def _limit_value(value: Any) -> Any:
    """Return a value that is written or compared, if it is small."""
    count_steps(1)
    check_values([value] if not isinstance(value, int) else ())
    return value


def _limit_method(method: Any, arguments: tuple[Any, ...]) -> None:
    """Refuse a call of a string's method that would take long."""
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(text, str):
        _limit_text_method(text, name, arguments)


def _limit_text_method(text: str, name: str, arguments: tuple[Any, ...]) -> None:
    if name == "replace" and len(arguments) >= 2 and all(isinstance(each, str) for each in arguments[:2]):
        check_size(sys.getsizeof(text) + text.count(arguments[0]) * sys.getsizeof(arguments[1]))
    elif name == "join" and arguments and isinstance(arguments[0], list | tuple):
        check_size(sys.getsizeof(text) * len(arguments[0]) + measure_value(arguments[0]))
    elif name in ("strip", "lstrip", "rstrip", "trim") and arguments and isinstance(arguments[0], str):
        check_size(len(text) * len(arguments[0]) / 100)  # each character is looked up in the argument
    elif name in ("translate", "expandtabs"):
        largest = max(
            (each if isinstance(each, int) else max(map(measure_value, each.values()), default=0) if isinstance(each, dict) else 1)
            for each in (*arguments, 8)
        )
        check_size(len(text) * largest)


def _limit_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter, so that its values and its result are limited."""

    @wraps(function)
    def limited(*arguments: Any, **options: Any) -> Any:
        values = (*arguments, *options.values())
        check_values([each for each in values if isinstance(each, int)] if name in SHALLOW_FILTERS else values)
        _check_filter(name, values)
        result = function(*arguments, **options)
        check_size(measure_value(result))
        return result

    return limited


def _check_filter(name: str, values: tuple[Any, ...]) -> None:
    """Refuse a filter that would take long or make much."""
    texts = [each for each in values if isinstance(each, str)]
    numbers = [each for each in values if isinstance(each, int)]
    if name == "format":
        _check_format(texts[0] if texts else None, values)
    elif name == "replace" and len(texts) >= 3:
        _limit_text_method(texts[0], "replace", tuple(texts[1:3]))
    elif name == "trim" and len(texts) >= 2:
        _limit_text_method(texts[0], "strip", (texts[1],))
    elif name in ("indent", "tojson"):
        widths = [*numbers, *map(len, texts[1:])]
        check_size(max(map(measure_value, values), default=0) * max(widths, default=1))
    elif name == "join":
        separator = max(map(sys.getsizeof, texts), default=0)
        check_size(sum(separator * len(each) for each in values if isinstance(each, list | tuple)))
    elif name == "list":
        check_size(ELEMENT_BYTES * max(map(len, texts), default=0))
    elif name in ("batch", "slice"):
        check_size(ELEMENT_BYTES * max(numbers, default=0))
    elif name == "sum":
        check_size(
            sum(len(each) * measure_value(each) / 100 for each in values if isinstance(each, list | tuple))
        )  # sums of lists copy them
    elif name == "round" and any(abs(number) > 1_000 for number in numbers[-1:]):
        refuse_template("rounds to a great number of digits")
    elif name in QUADRATIC_FILTERS:
        count_steps(max(map(measure_value, values), default=0) ** 2 >> 14)


def _limit_test(function: Any) -> Any:
    """Wrap a test, such as `is in`, so that its values are limited."""

    @wraps(function)
    def limited(*arguments: Any) -> Any:
        count_steps(1)
        check_values(each for each in arguments if not isinstance(each, int))
        return function(*arguments)

    return limited


class LimitedTemplate(Template):
    """A template whose rendering is counted."""

    def generate(self, *arguments: Any, **variables: Any) -> Iterator[str]:
        """Render piece by piece. Raises TemplateLimitError."""
        size = 0
        with Budget():
            for piece in super().generate(*arguments, **variables):
                size += sys.getsizeof(piece)
                check_size(size if size > MAX_BYTES else sys.getsizeof(piece))
                yield piece

    def render(self, *arguments: Any, **variables: Any) -> str:
        """Render at once. Raises TemplateLimitError."""
        with Budget():
            return super().render(*arguments, **variables)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end: steps, seconds and sizes are limited.

    Catastrophic regular expressions of filters that others add are not.
    """

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    template_class = LimitedTemplate
    concat = staticmethod(_join_parts)

    def limit(self) -> None:
        """Put limits around the operators and filters that are there now."""
        self.binop_table = {**self.binop_table, "*": _multiply, "**": _power, "+": _add, "%": _format}
        self.filters = {name: _limit_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"_limit_iteration": _limit_iteration, "_limit_value": _limit_value, "_concatenate": _concatenate}
        self.tests = {name: _limit_test(function) for name, function in self.tests.items()}
        self.globals.pop("lipsum", None)  # writes as many paragraphs as it is told to in one call

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        count_steps(1)
        check_values((*args, *kwargs.values()))
        _limit_method(__obj, args)
        result = super().call(__context, __obj, *args, **kwargs)
        check_size(measure_value(result))
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
        """Compile, with counted loops and measured values."""
        with Budget():  # constants are computed here
            return super()._generate(_LimitTransformer(self).visit(source), *arguments, **options)


class _LimitTransformer(NodeTransformer):
    """Puts filters that count and measure into a template."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def _wrap(self, node: Any, name: str) -> Any:
        """Apply a filter to an expression."""
        if isinstance(node, nodes.TemplateData | nodes.Const):
            return node
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self.environment)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the passes of a loop."""
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_limit_iteration", [], [], None, None, lineno=node.lineno, environment=self.environment)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Measure the text that `a ~ b` makes."""
        self.generic_visit(node)
        parts = nodes.List([self._wrap(each, "_limit_value") for each in node.nodes], lineno=node.lineno, environment=self.environment)
        concatenated: nodes.Node = self._wrap(parts, "_concatenate")
        return concatenated

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Measure what is compared."""
        self.generic_visit(node)
        node.expr = self._wrap(node.expr, "_limit_value")
        for operand in node.ops:
            operand.expr = self._wrap(operand.expr, "_limit_value")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """Measure what is written."""
        self.generic_visit(node)
        node.nodes = [self._wrap(each, "_limit_value") for each in node.nodes]
        return node

    def _visit_literal(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._wrap(node, "_limit_value")

    visit_List = visit_Tuple = visit_Dict = _visit_literal


def limit_chat_templates() -> None:
    """Limit the chat templates that transformers renders in this process."""
    from functools import lru_cache

    from transformers.utils import chat_template_utils

    compile_template = chat_template_utils._cached_compile_jinja_template
    if getattr(chat_template_utils._compile_jinja_template, "is_limited", False):
        return

    @lru_cache
    def compile_limited(chat_template: str) -> Template:
        if len(chat_template) > MAX_TEMPLATE_CHARACTERS:
            refuse_template(f"has more than {MAX_TEMPLATE_CHARACTERS:,} characters")
        environment = compile_template("").environment  # nothing of the template is run before its limits are there
        environment.__class__ = LimitedEnvironment
        environment.limit()
        template: Template = environment.from_string(chat_template)
        return template

    compile_limited.is_limited = True  # type: ignore[attr-defined]
    chat_template_utils._compile_jinja_template = compile_limited
