"""The text of a pretrain recipe made ready: every source tokenised, without held-out documents and duplicates, and what that came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from azrecipe.data import deduplication
from azrecipe.data.readers import Located
from azrecipe.data.token_store import Store, held_out_hashes
from azrecipe.data.tokenized_cache import Making, store
from azrecipe.recipe.types import Pretrain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (10, 25, 50, 75, 90, 95, 99, 100)
LENGTHS = tuple(2**power for power in range(9, 18))  # 512 to 131,072 tokens


@dataclass(frozen=True)
class Text:
    """Sources to train on, and held-out documents that they must not hold: their text, and hashes of it before its clean-up."""

    sources: Sequence[Located]
    held_out: Mapping[str, list[str]]
    came: frozenset[bytes]


def stores(config: Pretrain, text: Text, tokenizer: PreTrainedTokenizerBase, cache: Path) -> list[Store]:
    """The sources tokenised and, where the recipe asks for it, deduplicated; from the cache or made now."""
    asked = config.data.deduplication
    near = asked if asked and asked.method == "minhash" else None
    making = Making(tokenizer, held_out_hashes(text.held_out, text.came), near)
    made = [store(source, making, cache) for source in text.sources]
    if asked is None:
        return made
    return deduplication.unique(made, text.sources, [t for texts in text.held_out.values() for t in texts], asked, cache)


def told(source: Located, stored: Store) -> dict[str, Any]:
    """What a source came to, for result.json."""
    return {
        "source": source.title,
        "documents": stored.documents,
        "bytes": stored.bytes,
        "tokens": stored.count,
        "held_out_left_out": stored.excluded,
        **({"duplicates": stored.duplicates} if stored.duplicates else {}),
        **({"cleaned": stored.cleaned} if stored.cleaned else {}),
    }


def dropped(stored: Store) -> dict[str, int]:
    """How many documents of a source were left out, by reason; reasons without any are left out too."""
    cleaned, repeated = stored.cleaned or {}, stored.duplicates or {}
    found = {
        "held out": stored.excluded,
        "clean-up": cleaned.get("dropped_documents", 0),
        **cleaned.get("filtered", {}),
        "duplicates": repeated.get("exact", 0),
        "near duplicates": repeated.get("near", 0),
        "near held-out ones": repeated.get("near_held_out", 0),
    }
    return {reason: count for reason, count in found.items() if count}


def left_out(stored: Store) -> str:
    """The end of a line about a source: what was left out of it."""
    found = dropped(stored)
    return f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in found.items())}" if found else ""


@dataclass(frozen=True)
class Prepared:
    """The stores of a recipe's sources, in their order."""

    sources: Sequence[Located]
    stores: Sequence[Store]
    max_length: int

    def percentiles(self, nth: int) -> dict[int, int]:
        """The lengths of a source's documents in tokens at PERCENTILES; 100 is the longest."""
        lengths = self.stores[nth].lengths
        return dict(zip(PERCENTILES, np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist(), strict=True))

    def fits(self, nth: int) -> dict[int, float]:
        """The share of a source's documents of at most so many tokens, for max_length and LENGTHS."""
        lengths = self.stores[nth].lengths
        return {length: float((lengths <= length).mean()) for length in sorted({*LENGTHS, self.max_length})}
