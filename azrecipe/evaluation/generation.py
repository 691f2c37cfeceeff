"""Generate text after prompts, in batches, and store it line by line.

Batches are padded on the left. Decoding is greedy, or sampled with a seed for each prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from azrecipe.errors import CommandError
from azrecipe.modeling.attention import disable_cudnn_attention
from azrecipe.recipe.types import Generation, PromptEntry
from azrecipe.utils.atomic_files import append_json_lines, read_and_repair_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PromptContent = str | list[dict[str, str]]  # text to continue, or messages that end with the one to answer


def to_prompt_content(prompt: str | PromptEntry) -> PromptContent:
    """Convert a recipe's prompt to text or messages."""
    if isinstance(prompt, str):
        return prompt
    if prompt.text is not None:
        return prompt.text
    assert prompt.messages is not None
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def get_prompt_title(prompt: PromptContent) -> str:
    """Get the text that names a prompt in a report."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


class EncodedPrompt(NamedTuple):
    """The token ids of a prompt, and its form: "chat" or "text"."""

    ids: list[int]
    form: str


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptContent) -> EncodedPrompt:
    """Encode a prompt, by the chat template if there is one.

    A tokenizer without a template gets the last message as plain text.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text or messages.

    Raises:
        CommandError: The template refuses the messages.
    """
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return EncodedPrompt(list(tokenizer(get_prompt_title(prompt))["input_ids"]), "text")
    try:
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise CommandError(
            f"the chat template refuses the conversation that ends with '{get_prompt_title(prompt)[:60]}': {error}"
        ) from None
    return EncodedPrompt(list(encoded["input_ids"]), "chat")


def find_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end a generation.

    They come from generation_config and from the tokenizer.
    """
    config_ids = model.generation_config.eos_token_id
    config_ids = config_ids if isinstance(config_ids, list) else [] if config_ids is None else [config_ids]
    return list(dict.fromkeys([*config_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))


class GumbelSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples tokens by Gumbel noise, with one random generator a row.

    The largest score plus noise is a draw from the softmax of the scores (the Gumbel-max trick, Gumbel 1954; Maddison et al. 2014,
    arXiv 1411.0030). No row's draw depends on the others.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack([-torch.empty(scores.shape[-1]).exponential_(generator=g).log() for g in self.generators])
        return scores + noise.to(scores.device)


@dataclass(frozen=True)
class TextGenerator:
    """A model that generates text by the recipe's settings.

    The model's own sampling settings are not used.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Generation
    seed: int

    def generate(self, prompts: Sequence[PromptContent]) -> list[dict[str, Any]]:
        """Generate after one batch of prompts.

        Returns:
            For each prompt {"form", "output", "tokens", "ended"}. `tokens` counts the generated tokens with the end token. `ended` tells
            whether the model stopped by itself.
        """
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        stop_tokens = find_stop_tokens(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stop_tokens[0] if stop_tokens else 0
        prompt_length = max(len(ids) for ids, _ in encoded)
        ids = torch.tensor([[pad] * (prompt_length - len(row)) + row for row, _ in encoded])
        mask = torch.tensor([[0] * (prompt_length - len(row)) + [1] * len(row) for row, _ in encoded])
        device = self.model.device
        original_config, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with torch.no_grad(), disable_cudnn_attention():
                sequences = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,  # `GumbelSampler` samples
                    logits_processor=self._build_processors(prompts, [prompt_length - len(row) for row, _ in encoded]),
                    eos_token_id=stop_tokens or None,
                    pad_token_id=pad,
                )
        finally:
            self.model.generation_config = original_config
        return [
            self._describe(row, form, stop_tokens) for row, (_, form) in zip(sequences[:, prompt_length:].tolist(), encoded, strict=True)
        ]

    def _build_processors(self, prompts: Sequence[PromptContent], padding: Sequence[int]) -> list[LogitsProcessor]:
        """Build the logits processors of the recipe's settings."""
        settings = self.settings
        processors: list[LogitsProcessor] = []
        if settings.repetition_penalty != 1:  # it counts the prompt and the output, not the padding
            processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty, torch.tensor(padding)))
        if settings.temperature > 0:
            processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                processors.append(TopPLogitsWarper(settings.top_p))
            processors.append(GumbelSampler([derive_seed(prompt, self.seed) for prompt in prompts]))
        return processors

    def _describe(self, output_ids: list[int], form: str, stop_tokens: Sequence[int]) -> dict[str, Any]:
        """Cut an output after its end token and describe it."""
        length = next((i + 1 for i, token in enumerate(output_ids) if token in stop_tokens), None)
        output_ids = output_ids[:length]
        return {
            "form": form,
            "output": self.tokenizer.decode(output_ids, skip_special_tokens=True),
            "tokens": len(output_ids),
            "ended": length is not None,
        }


def derive_seed(prompt: PromptContent, seed: int) -> int:
    """Derive a prompt's seed from the recipe's seed and its content."""
    text = json.dumps([seed, prompt], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def is_incomplete(file: Path, count: int) -> bool:
    """Tell whether a file lacks generations of some prompts."""
    return len({line["nth"] for line in read_and_repair_lines(file)}) < count


def generate_missing(file: Path, prompts: Sequence[PromptContent], generator: TextGenerator, batch_size: int) -> Iterator[int]:
    """Generate after every prompt that the file lacks.

    A line is added for each prompt as soon as its batch is done. Batches do not depend on what the file holds, so a resumed run gives the
    same text as an uninterrupted one. Prompts of similar length share a batch, the longest first.

    Args:
        file: One JSON line a prompt.
        prompts: All prompts.
        generator: The model.
        batch_size: Prompts in a batch.

    Yields:
        The number of prompts that are done.
    """
    finished = {line["nth"] for line in read_and_repair_lines(file)}
    lengths = [len(encode_prompt(generator.tokenizer, prompt).ids) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if finished.issuperset(batch):
            continue
        outputs = zip(batch, generator.generate([prompts[index] for index in batch]), strict=True)
        append_json_lines(
            file,
            [{"nth": index, "prompt": get_prompt_title(prompts[index]), **output} for index, output in outputs if index not in finished],
        )
        yield min(start + batch_size, len(order))


def read_generations(file: Path) -> list[dict[str, Any]]:
    """Read the generations in the order of the prompts."""
    lines = sorted(read_and_repair_lines(file), key=lambda line: line["nth"])
    return [{key: value for key, value in line.items() if key != "nth"} for line in lines]
