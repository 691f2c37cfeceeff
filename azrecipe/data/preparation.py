"""Tokenise the sources of a pretrain recipe, without held-out documents and duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from azrecipe.data import deduplication
from azrecipe.data.readers import DataSource
from azrecipe.data.token_store import TokenStore, hash_held_out
from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
from azrecipe.recipe.types import PretrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (10, 25, 50, 75, 90, 95, 99, 100)
LENGTH_THRESHOLDS = tuple(2**power for power in range(9, 18))  # 512 to 131,072 tokens


@dataclass(frozen=True)
class PretrainText:
    """Sources to train on, and held-out documents to leave out of them.

    Attributes:
        sources: The sources.
        held_out: The held-out documents of each validation set.
        raw_hashes: Hashes of these documents before their clean-up.
    """

    sources: Sequence[DataSource]
    held_out: Mapping[str, list[str]]
    raw_hashes: frozenset[bytes]


def tokenize_sources(config: PretrainConfig, text: PretrainText, tokenizer: PreTrainedTokenizerBase, cache: Path) -> list[TokenStore]:
    """Tokenise and deduplicate the sources, or read the result from the cache.

    Args:
        config: The recipe; `data.deduplication` says whether and how documents are deduplicated.
        text: The sources and held-out documents.
        tokenizer: The tokenizer.
        cache: The folder of the cache.

    Returns:
        A store for each source.
    """
    settings = config.data.deduplication
    minhash = settings if settings and settings.method == "minhash" else None
    spec = TokenizeSpec(tokenizer, hash_held_out(text.held_out, text.raw_hashes), minhash)
    stores = [load_or_tokenize(source, spec, cache) for source in text.sources]
    if settings is None:
        return stores
    return deduplication.remove_duplicates(stores, text.sources, [t for texts in text.held_out.values() for t in texts], settings, cache)


def summarize_source(source: DataSource, store: TokenStore) -> dict[str, Any]:
    """Summarise a tokenised source for result.json."""
    return {
        "source": source.title,
        "documents": store.num_documents,
        "bytes": store.num_bytes,
        "tokens": store.num_tokens,
        "held_out_left_out": store.num_held_out,
        **({"duplicates": store.duplicates} if store.duplicates else {}),
        **({"cleaned": store.cleaning_report} if store.cleaning_report else {}),
    }


def count_dropped(store: TokenStore) -> dict[str, int]:
    """Count the dropped documents of a source by reason, zeros left out."""
    cleaned, repeated = store.cleaning_report or {}, store.duplicates or {}
    counts = {
        "held out": store.num_held_out,
        "clean-up": cleaned.get("dropped_documents", 0),
        **cleaned.get("filtered", {}),
        "duplicates": repeated.get("exact", 0),
        "near duplicates": repeated.get("near", 0),
        "near held-out ones": repeated.get("near_held_out", 0),
    }
    return {reason: count for reason, count in counts.items() if count}


def format_dropped(store: TokenStore) -> str:
    """Format the dropped documents to end a line about a source."""
    counts = count_dropped(store)
    return f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in counts.items())}" if counts else ""


@dataclass(frozen=True)
class PreparedText:
    """The stores of a recipe's sources, in their order."""

    sources: Sequence[DataSource]
    stores: Sequence[TokenStore]
    max_length: int

    def compute_percentiles(self, source: int) -> dict[int, int]:
        """Compute PERCENTILES of the lengths of a source's documents, in tokens."""
        lengths = self.stores[source].lengths
        return dict(zip(PERCENTILES, np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist(), strict=True))

    def compute_fitting_shares(self, source: int) -> dict[int, float]:
        """Compute the share of a source's documents that fit max_length and LENGTH_THRESHOLDS."""
        lengths = self.stores[source].lengths
        return {length: float((lengths <= length).mean()) for length in sorted({*LENGTH_THRESHOLDS, self.max_length})}
