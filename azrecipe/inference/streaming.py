"""Generate an answer to a prompt, and stream it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from azrecipe.errors import CannotRun, CommandError
from azrecipe.runs.finished_model import FinishedModel
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
NO_LIMIT = 2**31  # tokens of a model whose configuration has no limit
NO_TEMPLATE = "Instruction tuning (stage: sft) gives a model one, with chat_template: llama3"
REPLACEMENT_CHARACTER = "\ufffd"  # decoding gives it for a character whose last bytes are not there yet


@dataclass(frozen=True)
class GenerationSettings:
    """Options of generation, named as in transformers' GenerationConfig.

    A temperature of 0 means greedy decoding.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generated text.

    Attributes:
        text: The text.
        num_tokens: Its length.
        stop_reason: "end" (the model's end token), "length" (the limit) or "stopped" (Ctrl-C).
    """

    text: str
    num_tokens: int
    stop_reason: str


@dataclass(frozen=True)
class PromptReader:
    """A model's tokenizer and limits, before its weights are loaded.

    `context` is the largest number of tokens, prompt and answer together.
    """

    model: FinishedModel
    tokenizer: PreTrainedTokenizerBase
    context: int

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def render(self, messages: Messages) -> list[int]:
        """Render a conversation as ids, up to the assistant's turn.

        Raises CommandError where the chat template refuses it.
        """
        from jinja2 import TemplateError

        try:
            return list(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)["input_ids"])
        except TemplateError as error:
            raise CommandError(f"the chat template of {self.model.path} refuses the conversation: {error}") from None

    def encode_continuation(self, text: str) -> list[int]:
        """Encode plain text, with the tokenizer's begin token."""
        return list(self.tokenizer(text)["input_ids"])

    def load_generator(self, precision: str | None) -> StreamingGenerator:
        """Load the weights, onto the accelerator where there is one.

        Without a precision: float32 on a CPU, bfloat16 on an accelerator that has it. Raises CannotRun where it lacks bfloat16.
        """
        import torch
        from transformers.utils.logging import disable_progress_bar

        from azrecipe.distributed.backend import has_accelerator
        from azrecipe.modeling.loading import load_model

        lacks_bfloat16 = has_accelerator() and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bfloat16" and lacks_bfloat16:
            raise CannotRun(
                f"bfloat16 needs a GPU of NVIDIA's Ampere or newer, and this is {torch.cuda.get_device_name()}: --precision float32"
            )
        if not sys.stderr.isatty():
            disable_progress_bar()
        print_progress(f"loading {self.model.path}")
        dtype = precision or ("bfloat16" if has_accelerator() and not lacks_bfloat16 else "float32")
        model = load_model(self.model.path, dtype).eval()
        if has_accelerator():
            model = model.to(torch.accelerator.current_accelerator())
        return StreamingGenerator(self, model)


@dataclass(frozen=True)
class StreamingGenerator:
    """A loaded model."""

    reader: PromptReader
    model: PreTrainedModel

    def generate(self, ids: Sequence[int], settings: GenerationSettings, on_text: Callable[[str], None]) -> GeneratedAnswer:
        """Generate a continuation; Ctrl-C ends it.

        `on_text` is called with each new part of the text, in complete characters.
        """
        import torch

        from azrecipe.modeling.attention import disable_cudnn_attention

        tokenizer = self.reader.tokenizer
        num_free = self.reader.context - len(ids)
        assert num_free > 0, "the caller fits the prompt into the context"
        streamer = _CharacterStreamer(tokenizer, on_text)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
            if settings.temperature > 0
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # the model's values would only cause a warning
        )
        prompt = torch.tensor([list(ids)], device=self.model.device)
        pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        interrupted = False
        try:
            with torch.no_grad(), disable_cudnn_attention():
                self.model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, pad_token_id=pad_token_id,
                    max_new_tokens=min(settings.max_new_tokens, num_free), repetition_penalty=settings.repetition_penalty, **sampling,
                )  # fmt: skip
        except KeyboardInterrupt:
            interrupted = True
            streamer.end()
        end_ids = self.model.generation_config.eos_token_id
        has_ended = bool(streamer.ids) and streamer.ids[-1] in (end_ids if isinstance(end_ids, list) else [end_ids])
        return GeneratedAnswer(streamer.text, len(streamer.ids), "stopped" if interrupted else "end" if has_ended else "length")


class _CharacterStreamer:
    """A transformers streamer that passes on every complete character.

    The streamers of transformers wait for the end of a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.text = ""
        self.expects_prompt = True

    def put(self, value: Any) -> None:
        """Take token ids: first the prompt, then one at a time."""
        if self.expects_prompt:
            self.expects_prompt = False
            return
        self.ids.extend(value.flatten().tolist())
        text = self._decode()
        if not text.endswith(REPLACEMENT_CHARACTER):
            self._emit(text)

    def end(self) -> None:
        """Pass on the rest, an incomplete character included."""
        self._emit(self._decode())

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _emit(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece:
            self.on_text(piece)


def open_reader(model: FinishedModel) -> PromptReader:
    """Open a model's tokenizer and configuration.

    Raises CommandError or CannotRun where they cannot be opened, or do not fit each other.
    """
    from azrecipe.modeling.loading import check_vocabulary_size, load_meta_model
    from azrecipe.tokenization.tokenizer import load_tokenizer

    tokenizer, meta_model = load_tokenizer(model.path), load_meta_model(model.path)
    check_vocabulary_size(meta_model, tokenizer, model.path)
    context = getattr(meta_model.config.get_text_config(), "max_position_embeddings", None)
    return PromptReader(model, tokenizer, int(context or NO_LIMIT))


def read_settings(arguments: argparse.Namespace) -> GenerationSettings:
    """Read the generation options of a command line."""
    return GenerationSettings(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.repetition_penalty)


def seed_sampling(seed: int) -> None:
    """Seed the random numbers of sampling."""
    import torch

    torch.manual_seed(seed)
