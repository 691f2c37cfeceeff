"""Move a model from one vocabulary to another.

It decides which row of the embedding matrices a token starts with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CannotRun
from azrecipe.modeling.word_vectors import ComposedEmbeddings
from azrecipe.recipe.extras import WORD_VECTOR_METHODS
from azrecipe.tokenization.encoding import encode_texts
from azrecipe.tokenization.tokenizer import count_embedding_rows, is_byte_level_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FREE_METHODS = ("mean", "random")  # these methods do not split a token into pieces
TOKENS_PER_CHUNK = 4096  # tokens that are composed at once


@dataclass(frozen=True)
class EmbeddingInit:
    """How the embedding rows of new tokens are initialised.

    `composed` holds what `word_vectors.compose_embeddings` computed for "focus" and "omp".
    """

    method: str
    seed: int
    composed: ComposedEmbeddings | None = None


@dataclass(frozen=True)
class SwapReport:
    """The outcome of a vocabulary swap, in tokens.

    `copied` tokens are in both vocabularies. `composed` tokens start as `method` says. `fallback` tokens have no vector and start as
    "subtoken_mean". `padding` counts the rows beyond the tokens.
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
        parts = [f"{self.copied:,} tokens keep their embeddings", *(f"{count:,} {label}" for label, count in counts.items() if count)]
        padding = f", {self.padding:,} rows of padding" if self.padding else ""
        return f"{self.old_size:,} → {self.new_size:,}: {', '.join(parts)}{padding}"


def check_swap(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, method: str) -> None:
    """Check that the method works for both tokenizers.

    All methods but "mean" and "random" need byte-level BPE, whose tokens split byte by byte. Raises CannotRun otherwise.
    """
    for name, tokenizer in (("the model's", old), ("the new", new)):
        if method not in TOKENIZER_FREE_METHODS and not is_byte_level_bpe(tokenizer):
            raise CannotRun(
                f"{name} tokenizer is not a byte-level BPE (as Llama 3's is): {method} cannot match its tokens byte by byte. "
                f"tokenizer.new_embeddings that still work: {', '.join(TOKENIZER_FREE_METHODS)}"
            )


def find_shared_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, int]:
    """Map new ids to old ids of the tokens in both vocabularies.

    Tokens are matched by spelling, special ones by name. If only one of the two is byte-level, a spelling beyond ASCII means different
    things in them ("Ä" is a letter in one and the byte C4 in the other). Then only ASCII and special tokens are shared.
    """
    old_ids, special = old.get_vocab(), list_special_tokens(new)
    same_kind = is_byte_level_bpe(old) == is_byte_level_bpe(new)
    return {
        i: old_ids[token] for token, i in new.get_vocab().items() if token in old_ids and (same_kind or token.isascii() or token in special)
    }


def swap_vocabulary(model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, init: EmbeddingInit) -> SwapReport:
    """Give a model the new tokenizer's vocabulary, in place.

    This changes the input embeddings, the output head, tied or not, and its bias. A token of both vocabularies keeps its row. Any other
    token starts as `init.method` says:

    - "subtoken_mean": the mean of the rows of the pieces that the old tokenizer splits it into (also called FVT);
    - "mean": the mean of all old rows;
    - "random": normal, with the mean and standard deviation of each old column;
    - "focus", "omp": the sums in `init.composed`; a token without one as "subtoken_mean".

    A token without pieces, such as a new special one, takes the mean. The special ids in config and generation_config follow the new
    tokenizer.

    Args:
        model: The model; it is changed.
        old: The tokenizer that the model was trained with.
        new: The tokenizer that it gets.
        init: How new rows start.

    Raises:
        CannotRun: As `check_swap` does.
    """
    check_swap(old, new, init.method)
    assert (init.composed is not None) == (init.method in WORD_VECTOR_METHODS)
    shared = find_shared_tokens(old, new)
    pieces = {} if init.method in TOKENIZER_FREE_METHODS else _split_new_tokens(old, new, shared)
    plan = _RowPlan(count_embedding_rows(old), count_embedding_rows(new), shared, pieces, init)
    generator = torch.Generator().manual_seed(init.seed)
    old_matrices = _list_matrices(model)
    new_matrices = [plan.build_matrix(matrix.detach(), generator) for matrix in old_matrices]
    model.resize_token_embeddings(plan.new_rows, mean_resizing=False)
    with torch.no_grad():
        for matrix, rows in zip(_list_matrices(model), new_matrices, strict=True):
            matrix.copy_(rows)
    model.tie_weights()
    adopt_special_tokens(model, new)
    num_composed = len(new) - len(shared) if init.composed is None else len(init.composed.tokens)
    return SwapReport(len(old), len(new), len(shared), num_composed, len(new) - len(shared) - num_composed, 0, init.method)


def _list_matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """List what has a row for each token.

    These are the input embeddings and, of the head, its bias and its untied weight.
    """
    matrices, head = [model.get_input_embeddings().weight], model.get_output_embeddings()
    if head is not None and not model.config.tie_word_embeddings:
        matrices.append(head.weight)
    if getattr(head, "bias", None) is not None:
        matrices.append(head.bias)
    return matrices


def list_special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """List the texts of a tokenizer's special tokens."""
    return set(tokenizer.all_special_tokens) | {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _split_new_tokens(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, shared: Mapping[int, int]) -> dict[int, list[int]]:
    """Map each new id to the old ids of the token's pieces.

    Shared and special tokens are left out. Both vocabularies spell tokens in the same byte alphabet, so the old merges split the spelling
    itself. Text would lose tokens that are half a character. Added tokens are spelled as text.
    """
    tokenize, special = old.backend_tokenizer.model.tokenize, list_special_tokens(new)
    added_tokens = {token.content for token in new.added_tokens_decoder.values()}
    pieces: dict[int, list[int]] = {}
    for token, i in new.get_vocab().items():
        if i not in shared and token not in special:
            pieces[i] = encode_texts(old, [token])[0] if token in added_tokens else [piece.id for piece in tokenize(token)]
    return pieces


@dataclass(frozen=True)
class _RowPlan:
    """The source of each new row, the same for every matrix."""

    old_rows: int
    new_rows: int
    shared: Mapping[int, int]
    pieces: Mapping[int, list[int]]
    init: EmbeddingInit

    def build_matrix(self, matrix: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Build a new matrix [new_rows, …] from the old one.

        It keeps the dtype; sums are taken in float32.
        """
        old = matrix[: self.old_rows].float().cpu()  # rows beyond the tokenizer's size are padding
        mean = old.mean(0)
        rows = mean.expand(self.new_rows, *mean.shape).clone()
        if self.init.method == "random":
            rows = mean + old.std(0) * torch.randn(rows.shape, generator=generator)
        for i, ids in self.pieces.items():
            if ids:
                rows[i] = old[ids].mean(0)
        self._compose(rows, old, mean)
        if self.shared:
            rows[torch.tensor(list(self.shared))] = old[torch.tensor(list(self.shared.values()))]
        return rows.to(matrix.dtype)

    def _compose(self, rows: torch.Tensor, old: torch.Tensor, mean: torch.Tensor) -> None:
        """Write the composed rows, in place.

        The sum is of the old rows' differences from their mean and is added to the mean. If the weights add up to 1, this is the plain sum.
        If they do not (a pursuit's), the new row still lies among the old ones.
        """
        if self.init.composed is None:
            return
        tokens, sums = torch.from_numpy(self.init.composed.tokens), self.init.composed.combinations
        centered = (old - mean).reshape(len(old), -1)
        for first in range(0, len(tokens), TOKENS_PER_CHUNK):
            rows[tokens[first : first + TOKENS_PER_CHUNK]] = mean + sums.slice(first, TOKENS_PER_CHUNK).apply(centered).reshape(
                -1, *old.shape[1:]
            )


def pad_vocabulary(model: PreTrainedModel, num_tokens: int, multiple: int) -> int:
    """Add embedding rows until their number divides by `multiple`, in place.

    Rows are never removed. No text contains the ids of the new ones, so no label does.

    Args:
        model: The model; it is changed.
        num_tokens: The size of the vocabulary.
        multiple: What the number of rows divides by afterwards.

    Returns:
        The rows beyond `num_tokens`.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    padded = -(-rows // multiple) * multiple
    add_embedding_rows(model, padded, num_tokens)
    return padded - num_tokens


def add_embedding_rows(model: PreTrainedModel, num_rows: int, num_tokens: int | None = None) -> None:
    """Give a model `num_rows` embedding rows at least, in place.

    New rows start as the mean of the first `num_tokens` rows (None: of all rows). config.vocab_size becomes the number of rows.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if num_rows > rows:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
        with torch.no_grad():
            for matrix in _list_matrices(model):
                matrix[rows:] = matrix[: rows if num_tokens is None else num_tokens].float().mean(0).to(matrix.dtype)
        model.tie_weights()


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set BOS, EOS and padding of a model's configuration from its tokenizer."""
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
