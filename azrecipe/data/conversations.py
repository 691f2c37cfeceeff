"""Read conversations and preferences from rows of several formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from azrecipe.data.readers import DataSource, Row, read_rows
from azrecipe.data.sources import is_below_fraction
from azrecipe.errors import Problem, RecipeError, suggest_choices
from azrecipe.recipe.types import ConversationSource
from azrecipe.tokenization.chat_templates import Messages

T = TypeVar("T")

ROLES = ("system", "user", "assistant")
MAX_ERRORS = 20  # errors in rows that are listed; further ones are counted
SHAREGPT_ROLES = {
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
class PreferencePair:
    """A preference: a prompt, and a better and a worse answer."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


@dataclass(frozen=True)
class RowFormat(Generic[T]):
    """A format of rows.

    Attributes:
        columns: The columns that a row of this format has.
        parse: Converts a row; raises ValueError.
    """

    columns: frozenset[str]
    parse: Callable[[Row], T]


def read_conversations(source: DataSource) -> list[Messages]:
    """Read every conversation of a source.

    Raises:
        RecipeError: Rows are wrong; the error lists the first MAX_ERRORS.
    """
    return _read_formats(source, CONVERSATION_FORMATS)


def read_preferences(source: DataSource) -> list[PreferencePair]:
    """Read every preference of a source, like `read_conversations`."""
    return _read_formats(source, PREFERENCE_FORMATS)


def _read_formats(source: DataSource, formats: Mapping[str, RowFormat[T]]) -> list[T]:
    assert isinstance(source.entry, ConversationSource)
    name = source.entry.format
    if name != "auto" and name not in formats:
        raise source.error(f"format: {name} does not suit this method, which reads {', '.join(formats)}")
    parsed, errors = [], []
    for location, row in read_rows(source):
        if name == "auto":
            name = _recognize_format(row, formats) or ""
            if not name:
                choices = "; ".join(f"{each}: {', '.join(sorted(row_format.columns))}" for each, row_format in formats.items())
                raise source.error(f"{location}: the columns {', '.join(row)} match no known format. Formats and their columns: {choices}")
        try:
            for column in sorted(formats[name].columns - row.keys()):
                raise ValueError(f"no column '{column}'{suggest_choices(column, row, 'Columns')} (format: {name})")
            parsed.append(formats[name].parse(row))
        except ValueError as error:
            errors.append(f"{location}: {error}")
    if errors:
        more = [f"… and {len(errors) - MAX_ERRORS} rows more"] if len(errors) > MAX_ERRORS else []
        raise RecipeError([Problem(source.location, text) for text in [*errors[:MAX_ERRORS], *more]])
    if not parsed:
        raise source.error(f"{source.title} holds no {'preference' if 'preference' in formats else 'conversation'}")
    return parsed


def _recognize_format(row: Row, formats: Mapping[str, RowFormat[T]]) -> str | None:
    return next((name for name, row_format in formats.items() if row_format.columns <= row.keys()), None)


def _parse_messages(row: Row) -> Messages:
    return _check_messages(row["messages"])


def _parse_sharegpt(row: Row) -> Messages:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations must be a list of {from, value}")
    for number, turn in enumerate(turns, 1):
        if turn.get("from") not in SHAREGPT_ROLES:
            raise ValueError(
                f"message {number}: unknown role '{turn.get('from')}'{suggest_choices(str(turn.get('from')), SHAREGPT_ROLES, 'Roles')}"
            )
    messages = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")} for turn in turns]
    return _check_messages([*_parse_system(row), *messages])


def _parse_alpaca(row: Row) -> Messages:
    parts = [part for part in (row["instruction"], row.get("input")) if part not in (None, "")]
    question = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    return _check_messages([*_parse_system(row), {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}])


def _parse_prompt_completion(row: Row) -> Messages:
    return _check_messages([*_to_messages(row["prompt"], "user"), *_to_messages(row["completion"], "assistant")])


def _parse_pair(row: Row) -> PreferencePair:
    is_conversation = (
        isinstance(row["chosen"], list)
        and row["chosen"]
        and isinstance(row["chosen"][0], dict)
        and row["chosen"][0].get("role") != "assistant"
    )
    if "prompt" in row and not is_conversation:
        prompt = _to_messages(row["prompt"], "user")
        chosen, rejected = (_to_messages(row[key], "assistant") for key in ("chosen", "rejected"))
    else:
        chosen, rejected = (row[key] for key in ("chosen", "rejected"))
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise ValueError("chosen and rejected must be answers with a column 'prompt', or whole conversations, lists of {role, content}")
        num_shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:num_shared], chosen[num_shared:], rejected[num_shared:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        try:
            _check_messages([*prompt, *side])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if [message["role"] for message in side] != ["assistant"]:
            raise ValueError(f"{name} must be one answer of the assistant after the prompt")
    if not prompt:
        raise ValueError("the prompt is empty")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return PreferencePair(prompt, chosen, rejected)


def _to_messages(value: Any, role: str) -> list[Any]:
    """Convert a column, messages or a text by `role`, to messages."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _parse_system(row: Row) -> list[Any]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _check_messages(messages: Any) -> Messages:
    """Check messages; raises ValueError where they are not well formed."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of {role, content}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} has no role")
        if message["role"] not in ROLES:
            raise ValueError(f"message {number}: unknown role '{message['role']}'{suggest_choices(message['role'], ROLES, 'Roles')}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} ({message['role']}) is not text")
        if not message["content"].strip():
            raise ValueError(f"message {number} ({message['role']}) is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant: there is nothing to learn")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


CONVERSATION_FORMATS: Mapping[str, RowFormat[Messages]] = {
    "messages": RowFormat(frozenset({"messages"}), _parse_messages),
    "sharegpt": RowFormat(frozenset({"conversations"}), _parse_sharegpt),
    "alpaca": RowFormat(frozenset({"instruction", "output"}), _parse_alpaca),
    "prompt_completion": RowFormat(frozenset({"prompt", "completion"}), _parse_prompt_completion),
}
PREFERENCE_FORMATS: Mapping[str, RowFormat[PreferencePair]] = {"preference": RowFormat(frozenset({"chosen", "rejected"}), _parse_pair)}


def hash_row(row: Messages | PreferencePair) -> bytes:
    """Hash the content of a row, to tell whether two are equal."""
    plain = row if isinstance(row, list) else [row.prompt, row.chosen, row.rejected]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).digest()


class HeldOutSplit(NamedTuple):
    """The sides of a split, and the number of dropped duplicates."""

    train: list[Messages]
    held_out: list[Messages]
    duplicates: int


def split_held_out(conversations: Sequence[Messages], fraction: float) -> HeldOutSplit:
    """Split conversations by a hash of their content.

    So a conversation never changes sides.
    """
    unique = {hash_row(messages): messages for messages in conversations}
    train: list[Messages] = []
    held_out: list[Messages] = []
    for key, messages in unique.items():
        (held_out if is_below_fraction(key, fraction) else train).append(messages)
    return HeldOutSplit(train, held_out, len(conversations) - len(unique))
