"""Which tokenizers a comparison needs, and how few passes over the corpus make them: a sweep of sizes costs one training."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.errors import RunFailed
from azrecipe.parts import vocabulary
from azrecipe.parts.corpus import Located, mixed, texts
from azrecipe.parts.extension import extensions
from azrecipe.parts.files import read_json, whole_folder, write_json
from azrecipe.parts.tokens import text_hash
from azrecipe.parts.watching import peak_memory, say
from azrecipe.parts.writing import Tally
from azrecipe.recipe.types import Candidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Made = tuple["PreTrainedTokenizerBase", dict[str, Any]]
RECORD = "candidate.json"
PORTION = 1_000_000  # characters that a trainer is given at a time
LEAST_CORPUS = 257  # a custom vocabulary of the 256 bytes alone has learned nothing


@dataclass
class Text:
    """What tokenizers are trained on: documents mixed by weight, held-out ones left out, tokens that stand outside BPE cut out.

    Iterating reads it once more, from the start; the counts are those of the last time.
    """

    sources: list[Located]
    max_bytes: int | None
    excluded: frozenset[bytes]
    outside: Sequence[str]
    bytes: list[int] = field(default_factory=list)
    documents: int = 0
    left_out: int = 0
    spelled_out: int = 0
    tallies: list[Tally] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        self.bytes = [0] * len(self.sources)
        self.documents = self.left_out = self.spelled_out = 0
        self.tallies = [Tally() for _ in self.sources]
        names = re.compile("|".join(map(re.escape, sorted(self.outside, key=len, reverse=True)))) if self.outside else None
        for i, text in mixed(self.sources, self.max_bytes, self.tallies):
            if text_hash(text) in self.excluded:
                self.left_out += 1
                continue
            self.bytes[i] += len(text.encode())
            self.documents += 1
            pieces = names.split(text) if names else [text]
            self.spelled_out += len(pieces) - 1
            for piece in filter(None, pieces):
                yield from _portions(piece)

    def report(self) -> dict[str, Any]:
        """What was read, for result.json."""
        total = sum(self.bytes)
        return {
            "documents": self.documents,
            "bytes": total,
            "held_out_left_out": self.left_out,
            "special_tokens_in_text": self.spelled_out,
            "sources": [
                {
                    "source": s.title,
                    "bytes": size,
                    "share": round(size / total, 4) if total else 0.0,
                    **({"cleaned": tally.report()} if s.cleaned else {}),
                }
                for s, size, tally in zip(self.sources, self.bytes, self.tallies, strict=True)
            ],
        }


def _portions(text: str) -> Iterator[str]:
    """A text, or a very long one (a whole corpus as one .txt file) in parts that end with a line."""
    at = 0
    while len(text) - at > PORTION:
        end = text.rfind("\n", at, at + PORTION) + 1 or at + PORTION
        yield text[at:end]
        at = end
    yield text[at:] if at else text


@dataclass(frozen=True)
class Family:
    """Candidates that one training makes: the same kind, the same rules, the same protected text; only sizes differ."""

    kind: str
    pre_tokenizer: str
    protect: Located | None
    sizes: Mapping[str, int]


def families(candidates: Mapping[str, Candidate], protected: Mapping[str, Located]) -> list[Family]:
    """The trainings that a comparison takes, the baseline's (none) left out."""
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


def make(base: PreTrainedTokenizerBase, family: Family, text: Text) -> dict[str, Made]:
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


def _custom(base: PreTrainedTokenizerBase, family: Family, text: Text) -> dict[str, Made]:
    longest = vocabulary.train_like(base, text, max(family.sizes.values()), family.pre_tokenizer)
    if len(longest) < LEAST_CORPUS + len(longest.added_tokens_decoder):
        raise RunFailed("the corpus is too small to learn a single merge from")
    made = {}
    for name, size in family.sizes.items():
        tokenizer = vocabulary.shorter(longest, size)
        if len(tokenizer) < size:
            say(f"  {name}: the corpus gives {len(tokenizer):,} tokens, fewer than the {size:,} asked for: it is too small for more")
        made[name] = (tokenizer, {"asked_vocab_size": size, "pre_tokenizer": family.pre_tokenizer})
    return made


def _extended(base: PreTrainedTokenizerBase, family: Family, text: Text) -> dict[str, Made]:
    made = {}
    protect = texts(family.protect) if family.protect else ()
    for (name, size), found in zip(family.sizes.items(), extensions(base, text, list(family.sizes.values()), protect), strict=True):
        if found.added < size:
            say(f"  {name}: the corpus gives {found.added:,} new tokens, fewer than the {size:,} asked for: it is too small for more")
        counted = {key: getattr(found, key) for key in ("added", "merges", "dropped_for_protection", "unused")}
        made[name] = (found.tokenizer, {"asked_new_tokens": size, **counted})
    return made


def save(folder: Path, tokenizer: PreTrainedTokenizerBase, told: Mapping[str, Any]) -> None:
    """Write a candidate into a folder of its own, which appears whole or not at all."""
    with whole_folder(folder) as aside:
        vocabulary.save_tokenizer(tokenizer, aside)
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
