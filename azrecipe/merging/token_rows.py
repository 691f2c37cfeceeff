"""Which embedding rows of several models belong to the same token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.modeling.vocabulary_swap import find_shared_tokens, list_special_tokens
from azrecipe.tokenization.tokenizer import count_embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenRows:
    """The rows of the merged matrices, and what becomes of them.

    Attributes:
        merged: Ids, in the merged model, of the tokens that every model has.
        sources: Their ids in each model's vocabulary, by the model's name.
        copied: Ids of special tokens whose rows are taken as they are.
        copied_sources: Their ids in the model that they are taken from.
        num_tokens: Tokens of the merged vocabulary.
        num_rows: Rows of the merged matrices; those beyond the tokens are padding.
    """

    merged: torch.Tensor
    sources: Mapping[str, torch.Tensor]
    copied: torch.Tensor
    copied_sources: torch.Tensor
    num_tokens: int
    num_rows: int

    def count(self) -> dict[str, int]:
        """Count the rows by what becomes of them.

        `merged` are combined, `special` copied from the model of special_tokens_from, `kept` those of tokens that not every
        model has, and `padding` those without a token.
        """
        merged = len(set(self.merged.tolist()) - set(self.copied.tolist()))
        return {
            "merged": merged,
            "special": len(self.copied),
            "kept": self.num_tokens - merged - len(self.copied),
            "padding": self.num_rows - self.num_tokens,
        }


def align_tokens(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], target: str, num_rows: int, special_tokens_from: str | None = None
) -> TokenRows:
    """Align several vocabularies with one of them.

    Args:
        tokenizers: The models' tokenizers by name, the base's among them.
        target: The name of the model whose vocabulary is kept.
        num_rows: Rows of that model's matrices.
        special_tokens_from: The name of the model whose special tokens are copied.
    """
    new = tokenizers[target]
    shared = {name: find_shared_tokens(tokenizer, new) for name, tokenizer in tokenizers.items()}
    merged = sorted(set.intersection(*(set(ids) for ids in shared.values())))
    pairs: Sequence[tuple[int, int]] = ()
    if special_tokens_from is not None:
        old = tokenizers[special_tokens_from]
        old_ids, new_ids = old.get_vocab(), new.get_vocab()
        pairs = sorted((new_ids[token], old_ids[token]) for token in list_special_tokens(old) if token in new_ids and token in old_ids)
    return TokenRows(
        torch.tensor(merged, dtype=torch.long),
        {name: torch.tensor([ids[i] for i in merged], dtype=torch.long) for name, ids in shared.items()},
        torch.tensor([new_id for new_id, _ in pairs], dtype=torch.long),
        torch.tensor([old_id for _, old_id in pairs], dtype=torch.long),
        len(new),
        max(num_rows, count_embedding_rows(new)),
    )
