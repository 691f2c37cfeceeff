"""Chat templates: how a conversation becomes tokens, which of them the assistant says, and the token that ends its turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from azrecipe.errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

# Llama 3's turn format (Meta's model card), with generation marks around what the assistant says and its end of turn.
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
# ChatML (OpenAI's chat markup language, as Qwen writes it), without a system message that nobody gave.
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
# Gemma's turn format (Google's formatting guide); it has no system turn: as in Gemma 3, its text opens the first turn of the user.
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
    """A template that ships: its text, the special tokens that it needs as single ids, and the one that ends a turn."""

    text: str
    special_tokens: tuple[str, ...]
    end_of_turn: str


SHIPPED_TEMPLATES: Mapping[str, ChatTemplate] = {
    "llama3": ChatTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "gemma": ChatTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
}
PAD_TOKEN_NAMES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>")  # names that models give it
PROBE_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenised conversation: input_ids [n], labels [n] (-100 where no loss is taken), and whether its end was cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that are predicted and counted in the loss (the first of a sequence never is)."""
        return sum(label != -100 for label in self.labels[1:])


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, template: str, marks: bool = True, probe: Messages = PROBE_CONVERSATION
) -> list[int]:
    """Give a tokenizer the recipe's chat template, the end of turn as its EOS, and padding of its own; returns the ids that are new to it.

    `template`: a name in SHIPPED, "keep", or the path of a Jinja file. Tokens of a shipped template that the tokenizer lacks become
    special tokens of one id each. `marks`: whether the template must mark what the assistant says ({% generation %}), without
    which no token would be trained. `probe`: a conversation that it renders. Raises CommandError for a template that cannot be read, lacks the marks, or does not end a turn.
    """
    before = len(tokenizer)
    shipped = SHIPPED_TEMPLATES.get(template)
    if shipped is not None:
        _own_ids(tokenizer, shipped.special_tokens)
        tokenizer.chat_template = shipped.text
        tokenizer.eos_token = shipped.end_of_turn
    else:
        if template != "keep":
            tokenizer.chat_template = _text(template)
        if tokenizer.chat_template is None:
            raise CommandError(
                "chat_template: keep, and the model's tokenizer has no chat template (a base model has none): "
                f"say chat_template: {', '.join(SHIPPED_TEMPLATES)} or the path of a .jinja file"
            )
        if marks:
            _check_marks(str(tokenizer.chat_template), template)
        tokenizer.eos_token = find_end_of_turn(tokenizer, probe, marks) or tokenizer.eos_token
    _pad(tokenizer)
    return list(range(before, len(tokenizer)))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"chat_template: {path} cannot be read: {error}") from None


def _check_marks(template: str, name: str) -> None:
    if not has_generation_marks(template):
        raise CommandError(
            f"chat_template: {name} does not mark what the assistant says ({{% generation %}} … {{% endgeneration %}}), so the loss cannot be "
            f"limited to it: add the marks, say one of {', '.join(SHIPPED_TEMPLATES)}, or training.assistant_only_loss: false"
        )


def has_generation_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's part."""
    return "generation" in template and "endgeneration" in template


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, probe: Messages = PROBE_CONVERSATION, marks: bool = True) -> str | None:
    """The special token that ends the assistant's turn, found by rendering one: within the template's marks, or behind the answer.

    Raises CommandError where the marks hold none: a model that is never trained on it never stops, and the loss looks well all
    the same. Without marks: None where there is none.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not marks:
        last = max((n for n, message in enumerate(probe) if message["role"] == "assistant"), default=0)
        ids = list(render_conversation(tokenizer, probe[: last + 1], marks=False)["input_ids"])
        prompt = list(tokenizer.apply_chat_template(probe[:last], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"])
        behind = next((i for i in ids[len(prompt) :] if i in special), None) if last else None
        return None if behind is None else str(tokenizer.convert_ids_to_tokens(behind))
    encoded = render_conversation(tokenizer, probe, marks=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    first = mask.index(1) if 1 in mask else len(mask)
    stop = next((n for n in range(first, len(mask)) if not mask[n]), len(mask))
    found = [i for i in ids[first:stop] if i in special]
    if not found:
        raise CommandError(
            "chat_template: within its generation marks stands no special token that ends the assistant's turn, so the model would never "
            "learn to stop: put the end of turn before {% endgeneration %}"
        )
    return str(tokenizer.convert_ids_to_tokens(found[-1]))


def _own_ids(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> None:
    """Make tokens special ones of a single id, where they are not."""
    from tokenizers import AddedToken

    there = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if missing := [AddedToken(token, special=True, normalized=False) for token in tokens if token not in there]:
        tokenizer.add_tokens(missing, special_tokens=True)


def _pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding that is never the EOS: labels of padding are left out of the loss, and so would every end of turn be."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    known = tokenizer.get_vocab()
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    found = next((token for token in (*PAD_TOKEN_NAMES, tokenizer.unk_token) if token in known and token not in taken), None)
    if found is None:
        found = "<|pad|>"
        _own_ids(tokenizer, (found,))
    tokenizer.pad_token = found


def render_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages, marks: bool) -> Any:
    """A conversation by the tokenizer's template: input_ids and, with `marks`, assistant_masks. Raises CommandError where it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks)
    except TemplateError as error:
        begins = " ".join(messages[0]["content"].split())[:60]
        raise CommandError(f"the chat template refuses the conversation that begins with '{begins}': {error}") from None


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int, assistant_only: bool
) -> TokenizedExample:
    """A conversation as tokens, with labels on what the assistant says and its end of turn.

    One longer than `max_length` ends behind the last turn of the assistant that fits whole: half a turn would teach to stop
    nowhere. Without `assistant_only` it ends behind the last end of turn.
    """
    encoded = render_conversation(tokenizer, messages, assistant_only)
    ids = list(encoded["input_ids"])
    mask = list(encoded["assistant_masks"]) if assistant_only else [1] * len(ids)
    whole = len(ids)
    if whole > max_length:
        if assistant_only:
            ends = [n + 1 for n in range(max_length) if mask[n] and not (n + 1 < whole and mask[n + 1])]
        else:
            ends = [n + 1 for n in range(max_length) if ids[n] == tokenizer.eos_token_id]
        ids = ids[: ends[-1] if ends else 0]
    return TokenizedExample(ids, [token if on else -100 for token, on in zip(ids, mask, strict=False)], truncated=whole > max_length)
