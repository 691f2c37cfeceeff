"""Conversations: read, checked row by row, rendered with a template, and which of their tokens the loss covers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError

from azrecipe.errors import CommandError, Problem, RecipeError, hint
from azrecipe.parts.corpus import Located, rows
from azrecipe.recipe.types import ConversationSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
SHOWN = 20  # complaints about rows before the rest is only counted

# Llama 3's turn format (Meta's model card), with generation marks around what the assistant says and its end of turn.
LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Example:
    """A tokenised conversation: input_ids [n], labels [n] (-100 where no loss is taken), and whether its end was cut off."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def trained(self) -> int:
        """Tokens that are predicted and counted in the loss (the first of a sequence never is)."""
        return sum(label != -100 for label in self.labels[1:])


def read(located: Located) -> list[Messages]:
    """Every conversation of a source. Raises RecipeError naming each row that is wrong (the first 20, then a count)."""
    source = located.source
    assert isinstance(source, ConversationSource)
    shape = {"messages": _messages, "alpaca": _alpaca}[source.format]
    found, wrong = [], []
    for where, row in rows(located):
        try:
            found.append(_checked(shape(row)))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"… and {len(wrong) - SHOWN} rows more"] if len(wrong) > SHOWN else []
        raise RecipeError([Problem(located.place, text) for text in [*wrong[:SHOWN], *more]])
    if not found:
        raise located.wrong(f"{located.title} holds no conversation")
    return found


def _messages(row: dict[str, Any]) -> Any:
    if "messages" not in row:
        raise ValueError(f"no column 'messages'{hint('messages', row, 'Columns')} (format: messages)")
    return row["messages"]


def _alpaca(row: dict[str, Any]) -> Any:
    missing = [key for key in ("instruction", "output") if key not in row]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; columns: {', '.join(row)} (format: alpaca)")
    parts = [part for part in (row["instruction"], row.get("input")) if part not in (None, "")]
    question = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _checked(messages: Any) -> Messages:
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


def key(messages: Messages) -> bytes:
    """A conversation's content, for telling equal ones apart from others."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).digest()


def split(conversations: Sequence[Messages], fraction: float) -> tuple[list[Messages], list[Messages], int]:
    """(training, held out, duplicates left out): by a hash of each conversation's content, so that none moves sides."""
    unique = {key(messages): messages for messages in conversations}
    held = [m for k, m in unique.items() if int.from_bytes(k[:8], "big") < fraction * 2**64]
    train = [m for k, m in unique.items() if int.from_bytes(k[:8], "big") >= fraction * 2**64]
    return train, held, len(conversations) - len(unique)


def apply_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer the recipe's chat template, and the end of turn as its EOS. Raises CommandError where it cannot be.

    "llama3" needs Llama 3's header and end-of-turn tokens as single ids; "keep" needs a template that marks what the
    assistant says ({% generation %}), without which no token would be trained.
    """
    if template == "llama3":
        known = tokenizer.get_vocab()
        missing = [token for token in LLAMA3_TOKENS if token not in known]
        if missing:
            raise CommandError(
                f"chat_template: llama3 needs the tokens {', '.join(missing)}, and the model's tokenizer has none: use a base that has them, or chat_template: keep"
            )
        tokenizer.chat_template = LLAMA3
        tokenizer.eos_token = "<|eot_id|>"
    elif tokenizer.chat_template is None:
        raise CommandError(
            "chat_template: keep, and the model's tokenizer has no chat template (a base model has none): say chat_template: llama3"
        )
    elif not has_marks(str(tokenizer.chat_template)):
        raise CommandError(
            "chat_template: keep, and the model's template does not mark what the assistant says ({% generation %} … {% endgeneration %}), "
            "so the loss cannot be limited to it: add the marks to its chat_template, say chat_template: llama3, or training.assistant_only_loss: false"
        )
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        raise CommandError(
            "the tokenizer has no padding token of its own (it is absent or equals EOS, and then no end of turn would be trained)"
        )


def has_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's part."""
    return "generation" in template and "endgeneration" in template


def tokenize(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int, assistant_only: bool) -> Example:
    """Render and tokenise one conversation, cut to `max_length`, with labels on the assistant's tokens and end of turn."""
    try:
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=assistant_only)
    except TemplateError as error:
        begins = " ".join(messages[0]["content"].split())[:60]
        raise CommandError(f"the chat template refuses the conversation that begins with '{begins}': {error}") from None
    whole = list(encoded["input_ids"])
    ids = whole[:max_length]
    mask = list(encoded["assistant_masks"])[:max_length] if assistant_only else [1] * len(ids)
    return Example(ids, [token if on else -100 for token, on in zip(ids, mask, strict=True)], cut=len(whole) > max_length)


def loss(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> float | None:
    """Mean -ln p a trained token over examples, in the model's own vocabulary; None where there are none."""
    if not examples:
        return None
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            width = max(len(e.input_ids) for e in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full((len(batch), width), -100)
            for row, example in enumerate(batch):
                ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
                labels[row, : len(example.labels)] = torch.tensor(example.labels)
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()
            target = labels[:, 1:].to(model.device)
            total += float(F.cross_entropy(logits.transpose(1, 2), target, reduction="sum"))
            count += int((target != -100).sum())
    model.train(was_training)
    return total / count
