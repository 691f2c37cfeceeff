"""Carries a model from one vocabulary to another: which row of the embedding matrices a token starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CannotRun
from azrecipe.modeling.word_vectors import Composed
from azrecipe.recipe.extras import WORD_VECTOR_METHODS
from azrecipe.tokenization.encoding import encode
from azrecipe.tokenization.tokenizer import is_byte_level_bpe, rows_needed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANY_TOKENIZER = ("mean", "random")  # the methods that need no pieces of a token
CHUNK = 4096  # tokens composed at a time


@dataclass(frozen=True)
class Start:
    """How the rows of new tokens start: a method, its seed, and what `word_vectors.compose` found for "focus" and "omp"."""

    method: str
    seed: int
    composed: Composed | None = None


@dataclass(frozen=True)
class Swap:
    """What became of a vocabulary. The new tokens are those `copied` (in both), `composed` (as `method` says) and, for the methods
    that need a vector of the token, `fallback` (without one: as "subtoken_mean"). `padding`: rows beyond the tokens.
    """

    old_size: int
    new_size: int
    copied: int
    composed: int
    fallback: int
    padding: int
    method: str

    def __str__(self) -> str:
        counts = {"start as " + self.method: self.composed, "have no vector and start as subtoken_mean": self.fallback}
        told = [f"{self.copied:,} tokens keep their embeddings", *(f"{count:,} {what}" for what, count in counts.items() if count)]
        padding = f", {self.padding:,} rows of padding" if self.padding else ""
        return f"{self.old_size:,} → {self.new_size:,}: {', '.join(told)}{padding}"


def check_swap(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, method: str) -> None:
    """Raise CannotRun unless both tokenizers are byte-level BPE, whose tokens can be cut byte by byte, or the method cuts none."""
    for name, tokenizer in (("the model's", old), ("the new", new)):
        if method not in ANY_TOKENIZER and not is_byte_level_bpe(tokenizer):
            raise CannotRun(
                f"{name} tokenizer is not a byte-level BPE (as Llama 3's is): {method} cannot match its tokens byte by byte. "
                f"tokenizer.new_embeddings that still work: {', '.join(ANY_TOKENIZER)}"
            )


def shared_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, int]:
    """New id → old id of the tokens that both vocabularies hold, by spelling; special ones by name.

    Where only one of the two is byte-level, a spelling beyond ASCII means something else in each ("Ä" is a letter here and
    the byte C4 there), so only ASCII and special tokens count as shared.
    """
    known, special = old.get_vocab(), _special(new)
    alike = is_byte_level_bpe(old) == is_byte_level_bpe(new)
    return {i: known[token] for token, i in new.get_vocab().items() if token in known and (alike or token.isascii() or token in special)}


def swap_vocabulary(model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, start: Start) -> Swap:
    """Give a model the new tokenizer's vocabulary, in place: input embeddings and output head, tied or not, with its bias.

    A token that both vocabularies hold keeps its row. Any other starts as `start.method` says: "subtoken_mean" (mean of the
    rows of the pieces that the old tokenizer cuts its byte string into; also called FVT), "mean" (of all old rows),
    "random" (normal with the mean and standard deviation of each old column), "focus" or "omp" (the sums in
    `start.composed`; for a token that has none, as "subtoken_mean"). A token without pieces, a new special one,
    takes the mean. config's and generation_config's special ids follow the new tokenizer. Raises CannotRun as `check_swap` does.
    """
    check_swap(old, new, start.method)
    assert (start.composed is not None) == (start.method in WORD_VECTOR_METHODS)
    shared = shared_tokens(old, new)
    pieces = {} if start.method in ANY_TOKENIZER else _pieces(old, new, shared)
    plan = _Plan(rows_needed(old), rows_needed(new), shared, pieces, start)
    generator = torch.Generator().manual_seed(start.seed)
    before = _matrices(model)
    after = [plan.rows(matrix.detach(), generator) for matrix in before]
    model.resize_token_embeddings(plan.new_rows, mean_resizing=False)
    with torch.no_grad():
        for matrix, rows in zip(_matrices(model), after, strict=True):
            matrix.copy_(rows)
    model.tie_weights()
    adopt_special_tokens(model, new)
    composed = len(new) - len(shared) if start.composed is None else len(start.composed.tokens)
    return Swap(len(old), len(new), len(shared), composed, len(new) - len(shared) - composed, 0, start.method)


def _matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """What has a row for each token: the input embeddings and, of the head, the weight where it is not tied and the bias."""
    found, head = [model.get_input_embeddings().weight], model.get_output_embeddings()
    if head is not None and not model.config.tie_word_embeddings:
        found.append(head.weight)
    if getattr(head, "bias", None) is not None:
        found.append(head.bias)
    return found


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return set(tokenizer.all_special_tokens) | {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _pieces(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, shared: Mapping[int, int]) -> dict[int, list[int]]:
    """New id → the old ids that the old tokenizer cuts the token into, for tokens that are neither shared nor special.

    Both vocabularies spell tokens in the same byte alphabet, so the spelling itself is cut by the old merges. Decoding
    to text first would lose tokens that are half a character. Added tokens are spelled as text.
    """
    cut, special = old.backend_tokenizer.model.tokenize, _special(new)
    added = {token.content for token in new.added_tokens_decoder.values()}
    found: dict[int, list[int]] = {}
    for token, i in new.get_vocab().items():
        if i not in shared and token not in special:
            found[i] = encode(old, [token])[0] if token in added else [piece.id for piece in cut(token)]
    return found


@dataclass(frozen=True)
class _Plan:
    """Where each new row comes from: the same for every matrix."""

    old_rows: int
    new_rows: int
    shared: Mapping[int, int]
    pieces: Mapping[int, list[int]]
    start: Start

    def rows(self, matrix: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A new matrix [new_rows, …] from the old one, in its dtype; sums are taken in float32."""
        old = matrix[: self.old_rows].float().cpu()  # rows beyond the tokenizer's size are padding
        mean = old.mean(0)
        rows = mean.expand(self.new_rows, *mean.shape).clone()
        if self.start.method == "random":
            rows = mean + old.std(0) * torch.randn(rows.shape, generator=generator)
        for i, ids in self.pieces.items():
            if ids:
                rows[i] = old[ids].mean(0)
        self._compose(rows, old, mean)
        if self.shared:
            rows[torch.tensor(list(self.shared))] = old[torch.tensor(list(self.shared.values()))]
        return rows.to(matrix.dtype)

    def _compose(self, rows: torch.Tensor, old: torch.Tensor, mean: torch.Tensor) -> None:
        """Sums of the old rows' differences from their mean, added to it: the same where the weights add up to 1, and where
        they do not (a pursuit's), a new row still stands where the old ones do.
        """
        if self.start.composed is None:
            return
        tokens, sums = torch.from_numpy(self.start.composed.tokens), self.start.composed.sums
        apart = (old - mean).reshape(len(old), -1)
        for first in range(0, len(tokens), CHUNK):
            rows[tokens[first : first + CHUNK]] = mean + sums.part(first, CHUNK).of(apart).reshape(-1, *old.shape[1:])


def pad_vocabulary(model: PreTrainedModel, tokens: int, multiple: int) -> int:
    """Add rows to a model's input and output embeddings, in place, until their number divides by `multiple`; returns the rows
    beyond `tokens`, the size of the vocabulary.

    Rows are never taken away; no text holds the ids of the new ones, so no label does.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    wanted = -(-rows // multiple) * multiple
    add_rows(model, wanted, tokens)
    return wanted - tokens


def add_rows(model: PreTrainedModel, wanted: int, tokens: int | None = None) -> None:
    """Give a model `wanted` rows at least, in place. New ones start as the mean of the first `tokens` rows (None: of all there are).

    config.vocab_size is the number of rows.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if wanted > rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
        with torch.no_grad():
            for matrix in _matrices(model):
                matrix[rows:] = matrix[: rows if tokens is None else tokens].float().mean(0).to(matrix.dtype)
        model.tie_weights()


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model's configuration name the tokenizer's BOS, EOS and padding."""
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
