"""Train the candidates of a tokenizer comparison.

One training gives all sizes of a kind.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from azrecipe.errors import RunFailed
from azrecipe.recipe.types import Candidate
from azrecipe.tokenization import bpe_training
from azrecipe.tokenization.bpe_extension import extend_to_sizes
from azrecipe.tokenization.tokenizer import save_tokenizer
from azrecipe.utils.atomic_files import atomic_folder, read_json, write_json
from azrecipe.utils.console import print_progress
from azrecipe.utils.memory import measure_peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD_FILE = "candidate.json"
MIN_BYTE_VOCABULARY = 257  # the 256 bytes and one merge: with less, nothing is learned


class TrainedCandidate(NamedTuple):
    """A tokenizer and the record of its training, for result.json."""

    tokenizer: PreTrainedTokenizerBase
    record: dict[str, Any]


class Corpus(Protocol):
    """The text that tokenizers are trained on, read anew by each iteration."""

    def __iter__(self) -> Iterator[str]: ...

    def to_dict(self) -> dict[str, Any]:
        """Summarise what was read for result.json."""


@dataclass(frozen=True)
class CandidateFamily:
    """Candidates of one training, which differ in size only.

    Attributes:
        kind: custom or extended.
        pre_tokenizer: The rule that splits text.
        read_protected: Reads the text that the candidates protect; None: there is none.
        sizes: The size of each candidate, by name.
    """

    kind: str
    pre_tokenizer: str
    read_protected: Callable[[], Iterable[str]] | None
    sizes: Mapping[str, int]


def group_candidates(candidates: Mapping[str, Candidate], protected: Mapping[str, Callable[[], Iterable[str]]]) -> list[CandidateFamily]:
    """Group candidates by training; the baseline, which needs none, is left out.

    Args:
        candidates: The candidates, by name.
        protected: Reads the text that a candidate protects, by name.
    """
    families: dict[str, CandidateFamily] = {}
    for name, candidate in candidates.items():
        size = candidate.vocab_size if candidate.kind == "custom" else candidate.new_tokens
        if size is None:
            continue
        key = repr((candidate.kind, candidate.pre_tokenizer, candidate.protect))
        family = families.get(key)
        sizes = {**(family.sizes if family else {}), name: size}
        families[key] = CandidateFamily(candidate.kind, candidate.pre_tokenizer, protected.get(name), sizes)
    return list(families.values())


def train_family(base: PreTrainedTokenizerBase, family: CandidateFamily, text: Corpus) -> dict[str, TrainedCandidate]:
    """Train a family of candidates: the tokenizer and record of each name."""
    start = time.monotonic()
    trained = (_train_custom if family.kind == "custom" else _train_extended)(base, family, text)
    names = sorted(family.sizes)
    training = {
        **text.to_dict(),
        "seconds": round(time.monotonic() - start, 2),
        "peak_memory_bytes": measure_peak_memory(),
        "trained_together": names,
    }
    return {name: TrainedCandidate(tokenizer, {**record, "training": training}) for name, (tokenizer, record) in trained.items()}


def _train_custom(base: PreTrainedTokenizerBase, family: CandidateFamily, text: Corpus) -> dict[str, TrainedCandidate]:
    longest = bpe_training.train_like(base, text, max(family.sizes.values()), family.pre_tokenizer)
    if len(longest) < MIN_BYTE_VOCABULARY + len(longest.added_tokens_decoder):
        raise RunFailed("the corpus is too small to learn a single merge from")
    trained = {}
    for name, size in family.sizes.items():
        tokenizer = bpe_training.shorten_vocabulary(longest, size)
        if len(tokenizer) < size:
            print_progress(
                f"  {name}: the corpus yields {len(tokenizer):,} tokens, fewer than the {size:,} requested: it is too small for more"
            )
        trained[name] = TrainedCandidate(tokenizer, {"asked_vocab_size": size, "pre_tokenizer": family.pre_tokenizer})
    return trained


def _train_extended(base: PreTrainedTokenizerBase, family: CandidateFamily, text: Corpus) -> dict[str, TrainedCandidate]:
    trained = {}
    protect = family.read_protected() if family.read_protected else ()
    for (name, size), extension in zip(
        family.sizes.items(), extend_to_sizes(base, text, list(family.sizes.values()), protect), strict=True
    ):
        if extension.added < size:
            print_progress(
                f"  {name}: the corpus yields {extension.added:,} new tokens, fewer than the {size:,} requested: it is too small for more"
            )
        counts = {key: getattr(extension, key) for key in ("added", "merges", "dropped_for_protection", "unused")}
        trained[name] = TrainedCandidate(extension.tokenizer, {"asked_new_tokens": size, **counts})
    return trained


def save_candidate(folder: Path, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> None:
    """Save a candidate in a folder, complete or not at all."""
    with atomic_folder(folder) as tmp:
        save_tokenizer(tokenizer, tmp)
        write_json(tmp / RECORD_FILE, {"told": dict(record), "sizes": _list_file_sizes(tmp)})


def read_candidate_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a saved candidate.

    Returns None where there is none, or its files have changed.
    """
    saved = read_json(folder / RECORD_FILE)
    if saved is None or saved["sizes"] != _list_file_sizes(folder):
        return None
    record: dict[str, Any] = saved["told"]
    return record


def _list_file_sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != RECORD_FILE}


def get_min_vocab_size(base: PreTrainedTokenizerBase) -> int:
    """Get the smallest size of a custom vocabulary.

    It holds the added tokens, the 256 bytes and one merge.
    """
    return MIN_BYTE_VOCABULARY + len(base.added_tokens_decoder)


def get_model_type(base: PreTrainedTokenizerBase) -> str:
    """Get the type of a tokenizer's model, as BPE or Unigram."""
    return str(json.loads(base.backend_tokenizer.to_str())["model"]["type"])
