"""Stage tokenizer: train the candidates on the corpus, measure all on held-out text, write the chosen one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.errors import RunFailed
from azrecipe.parts import run_dir, vocabulary
from azrecipe.parts.backend import Backend
from azrecipe.parts.corpus import Located, mixed, texts
from azrecipe.parts.extension import extend
from azrecipe.parts.files import whole_folder
from azrecipe.parts.sources import Inputs
from azrecipe.parts.tokens import held_out_hashes, text_hash
from azrecipe.parts.watching import say
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Candidate, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Train, compare, choose. One process does it all; the others of a distributed launch have nothing to do."""
    if not backend.main:
        return {}
    config: Tokenizer = recipe.config
    place = run_dir.locate(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    base_path = inputs.folder(config.tokenizer, "tokenizer")
    sources = inputs.datasets(list(config.data.datasets))
    held_out = inputs.validation(config.data.validation)
    base = vocabulary.load_tokenizer(base_path, config.tokenizer.revision)
    if any(candidate.kind != "baseline" for candidate in config.candidates.values()) and not vocabulary.is_byte_level_bpe(base):
        raise recipe.problem(
            f"the tokenizer of {base_path} is not a byte-level BPE, so none can be trained with its rules or on top of it", "tokenizer"
        )
    protected = {name: inputs.located(c.protect, "candidates", name, "protect") for name, c in config.candidates.items() if c.protect}
    known = held_out_hashes(held_out)
    for source in sources:
        if all(text_hash(text) in known for text in texts(source)):  # stops at the first that is not
            raise source.wrong(f"{source.title} holds no text that is not held out")

    with run_dir.opened(recipe, place, inputs.found):
        tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        table: list[dict[str, Any]] = []
        for name, candidate in config.candidates.items():
            started = time.monotonic()
            corpus = Corpus(sources, config.training_bytes, known)
            tokenizers[name], made = _make(base, candidate, corpus, protected.get(name))
            line: dict[str, Any] = {"name": name, "kind": candidate.kind, "vocab_size": len(tokenizers[name]), **made}
            line["training"] = corpus.report() if corpus.documents else None
            line["seconds"] = round(time.monotonic() - started, 2)
            measures = {key: vocabulary.measure(tokenizers[name], texts) for key, texts in held_out.items()}
            line["fertility"] = {key: round(m.fertility, 4) for key, m in measures.items()}
            line["bytes_per_token"] = {key: round(m.bytes_per_token, 4) for key, m in measures.items()}
            table.append(line)
            say(f"  {name}: {line['vocab_size']:,} tokens, fertility " + ", ".join(f"{k} {v:.2f}" for k, v in line["fertility"].items()))

        first = next(iter(held_out))
        chosen: str = config.select
        if chosen == "lowest_fertility":
            chosen = min(table, key=lambda row: row["fertility"][first])["name"]
        with whole_folder(place.final) as aside:
            vocabulary.save_tokenizer(tokenizers[chosen], aside)
        result = {
            "stage": "tokenizer",
            "selected": chosen,
            "candidates": table,
            "definitions": {
                "fertility": "tokens per white-space separated word, no special tokens, summed over the held-out documents",
                "bytes_per_token": "bytes of UTF-8 text per token, summed over the held-out documents",
            },
            "validation": {key: _size(texts) for key, texts in held_out.items()},
        }
        place.finish(result)
    return result


class Corpus:
    """The training documents, mixed by weight; counts what it gives. Held-out documents are left out."""

    def __init__(self, sources: list[Located], max_bytes: int | None, excluded: frozenset[bytes]) -> None:
        self.sources, self.max_bytes, self.excluded = sources, max_bytes, excluded
        self.bytes = [0] * len(sources)
        self.documents = self.left_out = 0

    def __iter__(self) -> Iterator[str]:
        for i, text in mixed(self.sources, self.max_bytes):
            if text_hash(text) in self.excluded:
                self.left_out += 1
                continue
            self.bytes[i] += len(text.encode())
            self.documents += 1
            yield text

    def report(self) -> dict[str, Any]:
        total = sum(self.bytes)
        return {
            "documents": self.documents,
            "bytes": total,
            "held_out_left_out": self.left_out,
            "sources": [
                {"source": s.title, "bytes": size, "share": round(size / total, 4) if total else 0.0}
                for s, size in zip(self.sources, self.bytes, strict=True)
            ],
        }


def _make(
    base: PreTrainedTokenizerBase, candidate: Candidate, corpus: Corpus, protect: Located | None
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """A candidate's tokenizer, and what is to be said of its making."""
    if candidate.vocab_size is not None:
        return _custom(base, candidate.vocab_size, corpus), {"asked_vocab_size": candidate.vocab_size}
    if candidate.new_tokens is not None:
        extension = extend(base, corpus, candidate.new_tokens, texts(protect) if protect else ())
        if extension.added < candidate.new_tokens:
            say(
                f"  the corpus gives {extension.added:,} new tokens, fewer than the {candidate.new_tokens:,} asked for: it is too small for more"
            )
        counted = {key: getattr(extension, key) for key in ("added", "merges", "dropped_for_protection", "unused")}
        return extension.tokenizer, {"asked_new_tokens": candidate.new_tokens, **counted}
    return base, {}


def _custom(base: PreTrainedTokenizerBase, vocab_size: int, corpus: Corpus) -> PreTrainedTokenizerBase:
    trained = vocabulary.train_like(base, corpus, vocab_size)
    if len(trained) < vocab_size:
        say(f"  the corpus gives {len(trained):,} tokens, fewer than the {vocab_size:,} asked for: it is too small for more")
    if len(trained) <= 256:
        raise RunFailed("the corpus is too small to learn a single merge from")
    return trained


def _size(texts: list[str]) -> dict[str, int]:
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts), "words": sum(len(text.split()) for text in texts)}
