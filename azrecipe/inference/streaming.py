"""Knows how one prompt becomes an answer while it is being written: rendered, fitted into the context, streamed, stopped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from azrecipe.errors import CannotRun, CommandError
from azrecipe.runs.finished_model import Finished
from azrecipe.utils.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
NO_LIMIT = 2**31  # a model that does not say how many tokens it was made for
NO_TEMPLATE = "Instruction tuning (stage: sft) gives a model one, with chat_template: llama3"
BROKEN = "\ufffd"  # what decoding leaves of a character whose last bytes are still to come


@dataclass(frozen=True)
class Settings:
    """How to write; names are transformers.GenerationConfig's. A temperature of 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class Answer:
    """What was written: its text, its tokens, and why it ended: "end" (the model's own), "length" or "stopped" (Ctrl-C)."""

    text: str
    tokens: int
    why: str


@dataclass(frozen=True)
class Reader:
    """What a model can be asked, known before its weights are loaded. `context`: the most tokens, prompt and answer, it was made for."""

    model: Finished
    tokenizer: PreTrainedTokenizerBase
    context: int

    @property
    def chats(self) -> bool:
        return self.tokenizer.chat_template is not None

    def rendered(self, messages: Messages) -> list[int]:
        """A conversation as ids, up to where the assistant begins to speak. Raises CommandError where the template refuses it."""
        from jinja2 import TemplateError

        try:
            return list(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"])
        except TemplateError as error:
            raise CommandError(f"the chat template of {self.model.path} refuses the conversation: {error}") from None

    def continued(self, text: str) -> list[int]:
        """Plain text as ids, begun as the tokenizer begins a text."""
        return list(self.tokenizer(text)["input_ids"])

    def writer(self, precision: str | None) -> Writer:
        """Load the weights, onto the accelerator where there is one. None: float32 on a CPU, bfloat16 on an accelerator."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        from azrecipe.distributed.backend import has_accelerator
        from azrecipe.modeling.loading import load_model

        old = has_accelerator() and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bfloat16" and old:
            raise CannotRun(
                f"bfloat16 needs a GPU of NVIDIA's Ampere or newer, and this is {torch.cuda.get_device_name()}: --precision float32"
            )
        if not sys.stderr.isatty():
            disable_progress_bar()
        say(f"loading {self.model.path}")
        net = load_model(self.model.path, precision or ("bfloat16" if has_accelerator() and not old else "float32")).eval()
        if has_accelerator():
            net = net.to(torch.accelerator.current_accelerator())
        return Writer(self, net)


@dataclass(frozen=True)
class Writer:
    """A model that is loaded."""

    reader: Reader
    net: PreTrainedModel

    def write(self, ids: Sequence[int], settings: Settings, shown: Callable[[str], None]) -> Answer:
        """Continue `ids`; `shown` gets the text piece by piece, whole characters only, and Ctrl-C ends it."""
        import torch

        tokenizer = self.reader.tokenizer
        room = self.reader.context - len(ids)
        assert room > 0, "the caller fits the prompt into the context"
        stream = _Stream(tokenizer, shown)
        sampled = settings.temperature > 0
        ways: dict[str, Any] = (
            {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
            if sampled
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # a model's own would only be warned about
        )
        prompt = torch.tensor([list(ids)], device=self.net.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        stopped = False
        try:
            with torch.no_grad():
                self.net.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=stream, pad_token_id=pad,
                    max_new_tokens=min(settings.max_new_tokens, room), repetition_penalty=settings.repetition_penalty, **ways,
                )  # fmt: skip
        except KeyboardInterrupt:
            stopped = True
            stream.end()
        ends = self.net.generation_config.eos_token_id
        ended = bool(stream.ids) and stream.ids[-1] in (ends if isinstance(ends, list) else [ends])
        return Answer(stream.text, len(stream.ids), "stopped" if stopped else "end" if ended else "length")


class _Stream:
    """A transformers streamer that passes on every character as soon as it is whole (theirs wait for the end of a word)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shown: Callable[[str], None]) -> None:
        self.tokenizer, self.shown = tokenizer, shown
        self.ids: list[int] = []
        self.text = ""
        self.prompt = True

    def put(self, value: Any) -> None:
        """Token ids from generate: the prompt first, then one at a time."""
        if self.prompt:
            self.prompt = False
            return
        self.ids.extend(value.flatten().tolist())
        text = self._decoded()
        if not text.endswith(BROKEN):
            self._show(text)

    def end(self) -> None:
        """The rest, a character that was never finished included."""
        self._show(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _show(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece:
            self.shown(piece)


def reader(model: Finished) -> Reader:
    """Open a model's tokenizer and configuration. Raises CommandError or CannotRun where they cannot be, or do not belong together."""
    from azrecipe.modeling.loading import check_sizes, skeleton
    from azrecipe.tokenization.tokenizer import load_tokenizer

    tokenizer, net = load_tokenizer(model.path), skeleton(model.path)
    check_sizes(net, tokenizer, model.path)
    return Reader(model, tokenizer, int(getattr(net.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT))


def settings(arguments: argparse.Namespace) -> Settings:
    """The options of a command line as Settings."""
    return Settings(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.repetition_penalty)


def seed(number: int) -> None:
    """Begin the random numbers that sampling draws anew."""
    import torch

    torch.manual_seed(number)
