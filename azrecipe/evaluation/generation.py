"""What a model writes after prompts: in batches padded on the left, greedy or drawn with a seed of each prompt's own, kept line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from azrecipe.errors import CommandError
from azrecipe.recipe.types import Generation, Prompt
from azrecipe.utils.atomic_files import append_lines, whole_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Asked = str | list[dict[str, str]]  # text to continue, or messages of which the last one is to be answered


def asked(prompt: str | Prompt) -> Asked:
    """A recipe's prompt as text or messages."""
    if isinstance(prompt, str):
        return prompt
    if prompt.text is not None:
        return prompt.text
    assert prompt.messages is not None
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def title(prompt: Asked) -> str:
    """How a report names a prompt."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Asked) -> tuple[list[int], str]:
    """Token ids of a prompt, and its form: "chat" by the tokenizer's chat template, or "text".

    A tokenizer without a template gets the last message as plain text. Raises CommandError where the template refuses the messages.
    """
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return list(tokenizer(title(prompt))["input_ids"]), "text"
    try:
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise CommandError(f"the chat template refuses the conversation that ends with '{title(prompt)[:60]}': {error}") from None
    return list(encoded["input_ids"]), "chat"


def ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end what a model writes: generation_config's, and the tokenizer's own end."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))


class Drawn(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise, each row from a generator of its own: the largest score is then a draw from the softmax of the scores
    (the Gumbel-max trick, Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), and no row's draw depends on the others.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack([-torch.empty(scores.shape[-1]).exponential_(generator=g).log() for g in self.generators])
        return scores + noise.to(scores.device)


@dataclass(frozen=True)
class Writer:
    """A model that writes; settings and seed are the recipe's. The model's own sampling settings take no part."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Generation
    seed: int

    def write(self, prompts: Sequence[Asked]) -> list[dict[str, Any]]:
        """One batch: for each prompt {"form", "output", "tokens", "ended"}.

        `tokens` counts what was written, its end included; `ended` tells whether the model stopped by itself.
        """
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        stops = ends(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stops[0] if stops else 0
        width = max(len(ids) for ids, _ in encoded)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row, _ in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row, _ in encoded])
        device = self.model.device
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with torch.no_grad():
                whole = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,  # `Drawn` draws
                    logits_processor=self._processors(prompts, [width - len(row) for row, _ in encoded]),
                    eos_token_id=stops or None,
                    pad_token_id=pad,
                )
        finally:
            self.model.generation_config = own
        return [self._told(row, form, stops) for row, (_, form) in zip(whole[:, width:].tolist(), encoded, strict=True)]

    def _processors(self, prompts: Sequence[Asked], padding: Sequence[int]) -> list[LogitsProcessor]:
        asked = self.settings
        found: list[LogitsProcessor] = []
        if asked.repetition_penalty != 1:  # of the prompt and what follows it, not of the padding before it
            found.append(RepetitionPenaltyLogitsProcessor(asked.repetition_penalty, torch.tensor(padding)))
        if asked.temperature > 0:
            found.append(TemperatureLogitsWarper(asked.temperature))
            if asked.top_p < 1:
                found.append(TopPLogitsWarper(asked.top_p))
            found.append(Drawn([seed_of(prompt, self.seed) for prompt in prompts]))
        return found

    def _told(self, new: list[int], form: str, stops: Sequence[int]) -> dict[str, Any]:
        stop = next((i + 1 for i, token in enumerate(new) if token in stops), None)
        new = new[:stop]
        return {
            "form": form,
            "output": self.tokenizer.decode(new, skip_special_tokens=True),
            "tokens": len(new),
            "ended": stop is not None,
        }


def seed_of(prompt: Asked, seed: int) -> int:
    """A prompt's own seed: made of the recipe's and its content."""
    text = json.dumps([seed, prompt], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def missing(file: Path, count: int) -> bool:
    """Whether a file does not yet hold what was written after so many prompts."""
    return len({line["nth"] for line in whole_lines(file)}) < count


def fill(file: Path, prompts: Sequence[Asked], writer: Writer, batch_size: int) -> Iterator[int]:
    """Write after every prompt that the file does not hold, adding a line for each as soon as its batch is done. Yields how many are.

    Batches are the same whatever the file holds already, so that going on gives what a run left alone gives; prompts of like
    length stand together, the longest first.
    """
    have = {line["nth"] for line in whole_lines(file)}
    lengths = [len(encode(writer.tokenizer, prompt)[0]) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda nth: (-lengths[nth], nth))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if have.issuperset(batch):
            continue
        written = zip(batch, writer.write([prompts[nth] for nth in batch]), strict=True)
        append_lines(file, [{"nth": nth, "prompt": title(prompts[nth]), **found} for nth, found in written if nth not in have])
        yield min(start + batch_size, len(order))


def read(file: Path) -> list[dict[str, Any]]:
    """What `fill` wrote, in the order of the prompts."""
    lines = sorted(whole_lines(file), key=lambda line: line["nth"])
    return [{key: value for key, value in line.items() if key != "nth"} for line in lines]
