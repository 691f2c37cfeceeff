"""Conversations and preferences: rows of whichever shape read, checked one by one, told apart by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from azrecipe.data.readers import Located, rows
from azrecipe.errors import Problem, RecipeError, hint
from azrecipe.recipe.types import ConversationSource
from azrecipe.tokenization.chat_templates import Messages

Row = dict[str, Any]
T = TypeVar("T")

ROLES = ("system", "user", "assistant")
SHOWN = 20  # complaints about rows before the rest is only counted
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Pair:
    """A preference: what was said, and two ways to go on, the better one first."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True)
class Shape(Generic[T]):
    """A kind of row: the columns that it is known by, and what is made of it. `make` raises ValueError."""

    columns: frozenset[str]
    make: Callable[[Row], T]


def read(located: Located) -> list[Messages]:
    """Every conversation of a source. Raises RecipeError naming each row that is wrong (the first 20, then a count)."""
    return _read(located, CONVERSATIONS)


def read_pairs(located: Located) -> list[Pair]:
    """Every preference of a source; as `read`."""
    return _read(located, PREFERENCES)


def _read(located: Located, shapes: Mapping[str, Shape[T]]) -> list[T]:
    source = located.source
    assert isinstance(source, ConversationSource)
    name = source.format
    if name != "auto" and name not in shapes:
        raise located.wrong(f"format: {name} is not for this method, which reads {', '.join(shapes)}")
    found, wrong = [], []
    for where, row in rows(located):
        if name == "auto":
            name = _recognised(row, shapes) or ""
            if not name:
                known = "; ".join(f"{each}: {', '.join(sorted(shape.columns))}" for each, shape in shapes.items())
                raise located.wrong(
                    f"{where}: the columns {', '.join(row)} are those of no known format. Formats and their columns: {known}"
                )
        try:
            for column in sorted(shapes[name].columns - row.keys()):
                raise ValueError(f"no column '{column}'{hint(column, row, 'Columns')} (format: {name})")
            found.append(shapes[name].make(row))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"… and {len(wrong) - SHOWN} rows more"] if len(wrong) > SHOWN else []
        raise RecipeError([Problem(located.place, text) for text in [*wrong[:SHOWN], *more]])
    if not found:
        raise located.wrong(f"{located.title} holds no {'preference' if 'preference' in shapes else 'conversation'}")
    return found


def _recognised(row: Row, shapes: Mapping[str, Shape[T]]) -> str | None:
    return next((name for name, shape in shapes.items() if shape.columns <= row.keys()), None)


def _messages(row: Row) -> Messages:
    return _conversation(row["messages"])


def _sharegpt(row: Row) -> Messages:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations must be a list of {from, value}")
    for nth, turn in enumerate(turns, 1):
        if turn.get("from") not in SHAREGPT:
            raise ValueError(f"message {nth}: unknown role '{turn.get('from')}'{hint(str(turn.get('from')), SHAREGPT, 'Roles')}")
    own = [{"role": SHAREGPT[turn["from"]], "content": turn.get("value")} for turn in turns]
    return _conversation([*_system(row), *own])


def _alpaca(row: Row) -> Messages:
    parts = [part for part in (row["instruction"], row.get("input")) if part not in (None, "")]
    question = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    return _conversation([*_system(row), {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}])


def _prompt_completion(row: Row) -> Messages:
    return _conversation([*_side(row["prompt"], "user"), *_side(row["completion"], "assistant")])


def _pair(row: Row) -> Pair:
    whole = (
        isinstance(row["chosen"], list)
        and row["chosen"]
        and isinstance(row["chosen"][0], dict)
        and row["chosen"][0].get("role") != "assistant"
    )
    if "prompt" in row and not whole:
        prompt = _side(row["prompt"], "user")
        chosen, rejected = (_side(row[key], "assistant") for key in ("chosen", "rejected"))
    else:
        chosen, rejected = (row[key] for key in ("chosen", "rejected"))
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise ValueError("chosen and rejected must be answers with a column 'prompt', or whole conversations, lists of {role, content}")
        same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        try:
            _conversation([*prompt, *side])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if [message["role"] for message in side] != ["assistant"]:
            raise ValueError(f"{name} must be one answer of the assistant after the prompt")
    if not prompt:
        raise ValueError("the prompt is empty")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return Pair(prompt, chosen, rejected)


def _side(value: Any, role: str) -> list[Any]:
    """A column that holds text, which `role` says, or messages."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _system(row: Row) -> list[Any]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _conversation(messages: Any) -> Messages:
    """Messages that are well formed. Raises ValueError."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of {role, content}")
    for nth, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {nth} has no role")
        if message["role"] not in ROLES:
            raise ValueError(f"message {nth}: unknown role '{message['role']}'{hint(message['role'], ROLES, 'Roles')}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {nth} ({message['role']}) is not text")
        if not message["content"].strip():
            raise ValueError(f"message {nth} ({message['role']}) is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant: there is nothing to learn")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


CONVERSATIONS: Mapping[str, Shape[Messages]] = {
    "messages": Shape(frozenset({"messages"}), _messages),
    "sharegpt": Shape(frozenset({"conversations"}), _sharegpt),
    "alpaca": Shape(frozenset({"instruction", "output"}), _alpaca),
    "prompt_completion": Shape(frozenset({"prompt", "completion"}), _prompt_completion),
}
PREFERENCES: Mapping[str, Shape[Pair]] = {"preference": Shape(frozenset({"chosen", "rejected"}), _pair)}


def key(row: Messages | Pair) -> bytes:
    """A row's content, for telling equal ones apart from others."""
    plain = row if isinstance(row, list) else [row.prompt, row.chosen, row.rejected]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).digest()


def is_held_out(key: bytes, fraction: float) -> bool:
    """On which side of the split a row is: by a hash of its content, so that none moves sides."""
    return int.from_bytes(key[:8], "big") < fraction * 2**64


def split(conversations: Sequence[Messages], fraction: float) -> tuple[list[Messages], list[Messages], int]:
    """(training, held out, duplicates left out)."""
    unique = {key(messages): messages for messages in conversations}
    held = [m for k, m in unique.items() if is_held_out(k, fraction)]
    train = [m for k, m in unique.items() if not is_held_out(k, fraction)]
    return train, held, len(conversations) - len(unique)
