"""Which tokenizers a comparison needs, and how few passes over the corpus make them: a sweep of sizes costs one training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from azrecipe.errors import RunFailed
from azrecipe.recipe.types import Candidate
from azrecipe.tokenization import bpe_training
from azrecipe.tokenization.bpe_extension import extensions
from azrecipe.tokenization.tokenizer import save_tokenizer
from azrecipe.utils.atomic_files import read_json, whole_folder, write_json
from azrecipe.utils.console import say
from azrecipe.utils.memory import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Made = tuple["PreTrainedTokenizerBase", dict[str, Any]]
RECORD = "candidate.json"
LEAST_CORPUS = 257  # a custom vocabulary of the 256 bytes alone has learned nothing


class Corpus(Protocol):
    """The text that tokenizers are trained on; iterating reads it from the start."""

    def __iter__(self) -> Iterator[str]: ...

    def report(self) -> dict[str, Any]:
        """What was read, for result.json."""


@dataclass(frozen=True)
class Family:
    """Candidates that one training makes: the same kind, the same rules, the same protected text; only sizes differ."""

    kind: str
    pre_tokenizer: str
    protect: Callable[[], Iterable[str]] | None
    sizes: Mapping[str, int]


def families(candidates: Mapping[str, Candidate], protected: Mapping[str, Callable[[], Iterable[str]]]) -> list[Family]:
    """The trainings that a comparison takes, the baseline's (none) left out. `protected`: reads the text that a candidate protects."""
    found: dict[str, Family] = {}
    for name, candidate in candidates.items():
        size = candidate.vocab_size if candidate.kind == "custom" else candidate.new_tokens
        if size is None:
            continue
        key = repr((candidate.kind, candidate.pre_tokenizer, candidate.protect))
        known = found.get(key)
        sizes = {**(known.sizes if known else {}), name: size}
        found[key] = Family(candidate.kind, candidate.pre_tokenizer, protected.get(name), sizes)
    return list(found.values())


def make(base: PreTrainedTokenizerBase, family: Family, text: Corpus) -> dict[str, Made]:
    """Train a family once: the tokenizer of each name, and what is to be said of its making."""
    began = time.monotonic()
    made = (_custom if family.kind == "custom" else _extended)(base, family, text)
    together = sorted(family.sizes)
    training = {
        **text.report(),
        "seconds": round(time.monotonic() - began, 2),
        "peak_memory_bytes": peak_memory(),
        "trained_together": together,
    }
    return {name: (tokenizer, {**told, "training": training}) for name, (tokenizer, told) in made.items()}


def _custom(base: PreTrainedTokenizerBase, family: Family, text: Corpus) -> dict[str, Made]:
    longest = bpe_training.train_like(base, text, max(family.sizes.values()), family.pre_tokenizer)
    if len(longest) < LEAST_CORPUS + len(longest.added_tokens_decoder):
        raise RunFailed("the corpus is too small to learn a single merge from")
    made = {}
    for name, size in family.sizes.items():
        tokenizer = bpe_training.shorter(longest, size)
        if len(tokenizer) < size:
            say(f"  {name}: the corpus gives {len(tokenizer):,} tokens, fewer than the {size:,} asked for: it is too small for more")
        made[name] = (tokenizer, {"asked_vocab_size": size, "pre_tokenizer": family.pre_tokenizer})
    return made


def _extended(base: PreTrainedTokenizerBase, family: Family, text: Corpus) -> dict[str, Made]:
    made = {}
    protect = family.protect() if family.protect else ()
    for (name, size), found in zip(family.sizes.items(), extensions(base, text, list(family.sizes.values()), protect), strict=True):
        if found.added < size:
            say(f"  {name}: the corpus gives {found.added:,} new tokens, fewer than the {size:,} asked for: it is too small for more")
        counted = {key: getattr(found, key) for key in ("added", "merges", "dropped_for_protection", "unused")}
        made[name] = (found.tokenizer, {"asked_new_tokens": size, **counted})
    return made


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any]) -> None:
    """Write a candidate into a folder of its own, which appears whole or not at all."""
    with whole_folder(folder) as aside:
        save_tokenizer(tokenizer, aside)
        write_json(aside / RECORD, {"told": dict(told), "sizes": _sizes(aside)})


def saved(folder: Path) -> dict[str, Any] | None:
    """What was told of a candidate when it was saved; None where there is none, or its files are no longer what they were."""
    found = read_json(folder / RECORD)
    if found is None or found["sizes"] != _sizes(folder):
        return None
    told: dict[str, Any] = found["told"]
    return told


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != RECORD}


def least_size(base: PreTrainedTokenizerBase) -> int:
    """The smallest vocabulary that a custom tokenizer can have: added tokens, the 256 bytes, one merge."""
    return LEAST_CORPUS + len(base.added_tokens_decoder)


def describe(base: PreTrainedTokenizerBase) -> str:
    """The kind of a tokenizer's model, for a message about what it is not."""
    return str(json.loads(base.backend_tokenizer.to_str())["model"]["type"])
