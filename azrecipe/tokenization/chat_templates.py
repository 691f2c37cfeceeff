"""Render conversations by chat templates, with labels on the assistant's turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from azrecipe.errors import CommandError, get_first_line
from azrecipe.tokenization.encoding import IGNORE_INDEX, UnencodableTextError, get_panic_reason
from azrecipe.utils.template_budget import TemplateLimitError
from azrecipe.utils.template_limits import limit_chat_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

# Llama 3's turn format (Meta's model card), with generation marks around the assistant's text and its end of turn.
_LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
# ChatML (OpenAI's chat markup language, as Qwen writes it), without a default system message.
_CHATML = (
    "{%- if bos_token %}{{- bos_token }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] | trim + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- message['content'] | trim + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Gemma's turn format (Google's formatting guide); it has no system turn: as in Gemma 3, the system's text opens the first turn of the user.
_GEMMA = (
    "{{- bos_token }}"
    "{%- set opening = namespace(text='') %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- set opening.text = opening.text + (message['content'] | trim) + '\n\n' %}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- '<start_of_turn>model\n' }}"
    "{%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}"
    "{{- '<start_of_turn>user\n' + opening.text + (message['content'] | trim) + '<end_of_turn>\n' }}"
    "{%- set opening.text = '' %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A shipped template.

    Attributes:
        text: The Jinja template.
        special_tokens: The tokens that must be single ids.
        end_of_turn: The token that ends a turn.
    """

    text: str
    special_tokens: tuple[str, ...]
    end_of_turn: str


SHIPPED_TEMPLATES: Mapping[str, ChatTemplate] = {
    "llama3": ChatTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "gemma": ChatTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
}
PAD_TOKEN_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>")  # in use by models
PROBE_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenised conversation.

    Attributes:
        input_ids: The tokens, [tokens].
        labels: The tokens in the loss, else IGNORE_INDEX, [tokens].
        truncated: Whether its end was cut off.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def num_trained_tokens(self) -> int:
        """The tokens in the loss; the first of a sequence never is."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str, marks: bool = True, probe: Messages = PROBE_CONVERSATION
) -> list[int]:
    """Set a tokenizer's chat template, EOS and padding.

    The EOS becomes the end of turn.

    Args:
        tokenizer: The tokenizer; it is changed. Special tokens that it lacks for a shipped template are added.
        template: A name in SHIPPED_TEMPLATES, "keep", or the path of a Jinja file.
        marks: Whether the template must mark the assistant's text ({% generation %}); only marked tokens are trained.
        probe: A conversation that shows the end of turn.

    Returns:
        The ids that are new to the tokenizer.

    Raises:
        CommandError: The template cannot be read, lacks the marks, or does not end a turn.
    """
    limit_chat_templates()
    before = len(tokenizer)
    tokenizer.chat_template_name = template if template != "keep" else tokenizer.name_or_path  # for messages
    shipped = SHIPPED_TEMPLATES.get(template)
    if shipped is not None:
        _add_special_tokens(tokenizer, shipped.special_tokens)
        tokenizer.chat_template = shipped.text
        tokenizer.eos_token = shipped.end_of_turn
    else:
        if template != "keep":
            tokenizer.chat_template = _read_template(template)
        if tokenizer.chat_template is None:
            raise CommandError(
                "chat_template: keep needs a chat template in the model's tokenizer, which has none (a base model has none): "
                f"use chat_template: {', '.join(SHIPPED_TEMPLATES)} or the path of a .jinja file"
            )
        if marks:
            _check_marks(str(tokenizer.chat_template), template)
        tokenizer.eos_token = find_end_of_turn(tokenizer, probe, marks) or tokenizer.eos_token
    _set_pad_token(tokenizer)
    return list(range(before, len(tokenizer)))


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"chat_template: {path} cannot be read: {error}") from None


def _check_marks(template: str, name: str) -> None:
    if not has_generation_marks(template):
        raise CommandError(
            f"chat_template: {name} does not mark the assistant's text ({{% generation %}} … {{% endgeneration %}}), so the loss cannot be "
            f"limited to it: add the marks, use one of {', '.join(SHIPPED_TEMPLATES)}, or training.assistant_only_loss: false"
        )


def has_generation_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's text."""
    return "generation" in template and "endgeneration" in template


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, probe: Messages = PROBE_CONVERSATION, marks: bool = True) -> str | None:
    """Find the special token that ends the assistant's turn, by rendering one.

    With marks it is within them: a model that is never trained on it never stops, although its loss looks good. Without
    marks it follows the answer.

    Args:
        tokenizer: The tokenizer.
        probe: The conversation to render.
        marks: Whether the template has generation marks.

    Returns:
        The token; None for a template without marks that has none.

    Raises:
        CommandError: There is none within the marks.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not marks:
        last = max((n for n, message in enumerate(probe) if message["role"] == "assistant"), default=0)
        ids = list(render_conversation(tokenizer, probe[: last + 1], marks=False)["input_ids"])
        prompt = render_prompt(tokenizer, probe[:last])
        end_token = next((i for i in ids[len(prompt) :] if i in special), None) if last else None
        return None if end_token is None else str(tokenizer.convert_ids_to_tokens(end_token))
    encoded = render_conversation(tokenizer, probe, marks=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    first = mask.index(1) if 1 in mask else len(mask)
    stop = next((n for n in range(first, len(mask)) if not mask[n]), len(mask))
    end_tokens = [i for i in ids[first:stop] if i in special]
    if not end_tokens:
        raise CommandError(
            "chat_template: its generation marks contain no special token that ends the assistant's turn, so the model would never "
            "learn to stop: put the end of turn before {% endgeneration %}"
        )
    return str(tokenizer.convert_ids_to_tokens(end_tokens[-1]))


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> None:
    """Add tokens that are missing as special ones."""
    from tokenizers import AddedToken

    present = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if missing := [AddedToken(token, special=True, normalized=False) for token in tokens if token not in present]:
        tokenizer.add_tokens(missing, special_tokens=True)


def _set_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token that is not the EOS.

    Padding is left out of the loss, and so every end of turn would be.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = (tokenizer.eos_token, tokenizer.bos_token)
    pad_token = next((token for token in (*PAD_TOKEN_NAMES, tokenizer.unk_token) if token in vocabulary and token not in reserved), None)
    if pad_token is None:
        pad_token = "<|pad|>"
        _add_special_tokens(tokenizer, (pad_token,))
    tokenizer.pad_token = pad_token


def render_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages, marks: bool) -> Any:
    """Render a conversation: input_ids and, with `marks`, assistant_masks.

    Raises:
        CommandError: The template refuses the conversation.
    """
    with _translate_template_errors(tokenizer, messages):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Render a conversation as ids, up to the assistant's turn.

    Raises:
        CommandError: The template refuses the conversation.
    """
    with _translate_template_errors(tokenizer, messages):
        return list(tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"])


@contextlib.contextmanager
def _translate_template_errors(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Iterator[None]:
    """Translate what a template raises into CommandError."""
    try:
        yield
    except TemplateLimitError as error:
        name = getattr(tokenizer, "chat_template_name", None) or tokenizer.name_or_path or "the model"
        raise CommandError(f"chat_template: {name} cannot be used: {error}") from None
    except TemplateError as error:
        first_words = " ".join(str(messages[0].get("content", "")).split())[:60] if messages else ""
        raise CommandError(f"the chat template refuses the conversation that begins with '{first_words}': {error}") from None
    except (ArithmeticError, LookupError, RecursionError, SyntaxError, TypeError, ValueError) as error:  # 1 / 0, 'a' + 1
        name = getattr(tokenizer, "chat_template_name", None) or tokenizer.name_or_path or "the model"
        raise CommandError(f"chat_template: {name} cannot be used: {type(error).__name__}: {get_first_line(error)}") from None
    except BaseException as error:  # a panic of the tokenizers library
        if (reason := get_panic_reason(error)) is None:
            raise
        raise UnencodableTextError(0, max((str(message.get("content", "")) for message in messages), key=len, default=""), reason) from None


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int, assistant_only: bool
) -> TokenizedExample:
    """Tokenise a conversation, truncated after a full turn.

    Half a turn would teach the model never to stop.

    Args:
        tokenizer: The tokenizer, with its chat template.
        messages: The conversation.
        max_length: The most tokens. A longer conversation ends after the last turn of the assistant that fits.
        assistant_only: Whether only the assistant's text and its end of turn are in the loss. Without it, a conversation
            that is too long ends after the last end of turn of anyone.
    """
    encoded = render_conversation(tokenizer, messages, assistant_only)
    ids = list(encoded["input_ids"])
    mask = list(encoded["assistant_masks"]) if assistant_only else [1] * len(ids)
    full_length = len(ids)
    if full_length > max_length:
        if assistant_only:
            ends = [n + 1 for n in range(max_length) if mask[n] and not (n + 1 < full_length and mask[n + 1])]
        else:
            ends = [n + 1 for n in range(max_length) if ids[n] == tokenizer.eos_token_id]
        ids = ids[: ends[-1] if ends else 0]
    return TokenizedExample(
        ids, [token if in_loss else IGNORE_INDEX for token, in_loss in zip(ids, mask, strict=False)], truncated=full_length > max_length
    )
