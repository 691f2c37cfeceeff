"""Carries a model from one vocabulary to another: which row of the embedding matrices a token starts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CannotRun
from azrecipe.parts.vocabulary import is_byte_level_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Swap:
    """What a change of vocabulary did. Tokens: `copied` were in both, `composed` start from old pieces or as asked."""

    old_size: int
    new_size: int
    copied: int
    composed: int
    method: str


def check_swap(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> None:
    """Raise CannotRun unless both tokenizers are byte-level BPE, whose tokens can be matched byte by byte."""
    for name, tokenizer in (("the model's", old), ("the new", new)):
        if not is_byte_level_bpe(tokenizer):
            raise CannotRun(f"{name} tokenizer is not a byte-level BPE (as Llama 3's is): its tokens cannot be matched byte by byte")


def swap_vocabulary(model: PreTrainedModel, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, method: str, seed: int) -> Swap:
    """Give a model the new tokenizer's vocabulary, in place: input embeddings and output head, tied or not.

    A token whose bytes (or, for a special token, whose name) both vocabularies hold keeps its row. Any other starts
    as `method` says: "subtoken_mean" (mean of the rows of the pieces that the old tokenizer cuts its byte string
    into; also called FVT), "mean" (of all old rows) or "random" (normal with the mean and standard deviation of each
    old column). config's and generation_config's special ids follow the new tokenizer. Raises CannotRun for
    tokenizers that are not byte-level BPE.
    """
    check_swap(old, new)
    pieces = _pieces(old, new)
    tied = model.config.tie_word_embeddings
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and not tied:
        matrices.append(head.weight)
    generator = torch.Generator().manual_seed(seed)
    fresh = [_rows(matrix.detach(), pieces, len(old), method, generator) for matrix in matrices]
    model.resize_token_embeddings(len(new), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(fresh[0])
        if len(fresh) > 1:
            model.get_output_embeddings().weight.copy_(fresh[1])
    model.tie_weights()
    adopt_special_tokens(model, new)
    copied = sum(len(piece) == 1 and same for piece, same in pieces)
    return Swap(len(old), len(new), copied, len(pieces) - copied, method)


def _pieces(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    """For each new id: the old ids that stand for it, and whether that is the very same token.

    Both vocabularies spell tokens in the same byte alphabet, so the spelling itself is cut by the old merges. Decoding
    to text first would lose tokens that are half a character.
    """
    vocabulary, cut = old.get_vocab(), old.backend_tokenizer.model.tokenize
    special = set(new.all_special_tokens) | {token.content for token in new.added_tokens_decoder.values() if token.special}
    found: list[tuple[list[int], bool]] = [([], False)] * len(new)
    for token, i in new.get_vocab().items():
        if token in vocabulary:
            found[i] = ([vocabulary[token]], True)
        elif token not in special:
            found[i] = ([piece.id for piece in cut(token)], False)
    return found


def _rows(
    matrix: torch.Tensor, pieces: list[tuple[list[int], bool]], old_size: int, method: str, generator: torch.Generator
) -> torch.Tensor:
    """The new matrix [len(pieces), width] in the old one's dtype; sums are taken in float32."""
    old = matrix[:old_size].float().cpu()  # rows beyond the tokenizer's size are padding
    mean = old.mean(0)
    rows = mean.repeat(len(pieces), 1)
    if method == "random":
        rows = mean + old.std(0) * torch.randn(rows.shape, generator=generator)
    for i, (ids, same) in enumerate(pieces):
        if same:
            rows[i] = old[ids[0]]
        elif ids and method == "subtoken_mean":
            rows[i] = old[ids].mean(0)
    return rows.to(matrix.dtype)


def adopt_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model's configuration name the tokenizer's BOS, EOS and padding."""
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
