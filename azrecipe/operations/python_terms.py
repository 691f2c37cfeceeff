"""Errors and arguments in the terms of the Python interface."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from azrecipe.errors import CannotRun, CommandError, Problem, RecipeError

P = ParamSpec("P")
T = TypeVar("T")

_PATH = ((str, os.PathLike), "a path (str or Path)")
_OPTIONAL_PATH = ((str, os.PathLike, type(None)), "a path (str or Path) or None")
_OPTIONAL_TEXT = ((str, type(None)), "text or None")
_OPTIONAL_COUNT = ((int, type(None)), "a whole number or None")
# Each argument: its types, and how a message names them
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "recipe": _PATH, "runs_dir": _PATH, "path": _PATH, "config": _PATH,
    "overrides": ((Mapping, Sequence), "a mapping or a list of texts"),
    "step": _OPTIONAL_TEXT, "cell": _OPTIONAL_TEXT, "accelerate_config": _OPTIONAL_TEXT,
    "config_json": _OPTIONAL_PATH, "hardware_file": _OPTIONAL_PATH,
    "num_processes": _OPTIONAL_COUNT, "vocab_size": _OPTIONAL_COUNT, "nodes": ((int,), "a whole number"),
    "price_per_hour": ((int, float, type(None)), "a number or None"),
    "with_alternatives": ((bool,), "True or False"),
    "hardware": ((str, Sequence), "a name or a list of names"),
}  # fmt: skip
_OPTIONS = re.compile(
    r"--(accelerate-config|cell|config-json|hardware-file|hardware|nodes|num-processes|price-per-hour|runs-dir|step|vocab-size)\b"
)


def speak_python(function: Callable[P, T]) -> Callable[P, T]:
    """Check a function's arguments, and name arguments where errors name options.

    Arguments of a wrong type raise CommandError, all at once.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _check_types(signature.bind(*args, **kwargs).arguments)
        try:
            return function(*args, **kwargs)
        except RecipeError as error:
            error.problems = [_rename_place(problem) for problem in error.problems]
            raise
        except (CommandError, CannotRun) as error:
            if error.args:
                error.args = (_rename_options(str(error.args[0])), *error.args[1:])
            raise

    return call


def _check_types(arguments: Mapping[str, Any]) -> None:
    problems = []
    for name, value in arguments.items():
        if name not in _KINDS:
            continue
        types, words = _KINDS[name]
        is_number = int in types or float in types
        if not isinstance(value, types) or (isinstance(value, bool) and is_number) or isinstance(value, bytes):
            problems.append(f"{name}: {words}, not {type(value).__name__} ({value!r:.60})")
        elif (
            isinstance(value, Sequence) and not isinstance(value, str) and (wrong := [item for item in value if not isinstance(item, str)])
        ):
            problems.append(f"{name}: each element is a text, not {type(wrong[0]).__name__} ({wrong[0]!r:.60})")
        elif isinstance(value, Mapping) and (wrong := [key for key in value if not isinstance(key, str)]):
            problems.append(f"{name}: each key is a text, not {type(wrong[0]).__name__} ({wrong[0]!r:.60})")
    if problems:
        raise CommandError("\n".join(problems))


def _rename_options(text: str) -> str:
    return _OPTIONS.sub(lambda match: f"{match[1].replace('-', '_')}=…", text)


def _rename_place(problem: Problem) -> Problem:
    location = problem.location
    if location.file.startswith("--set "):
        location = replace(location, file=f"overrides: {location.file.removeprefix('--set ')}")
    return Problem(location, problem.message)
