"""Merge models of one architecture, whose vocabularies may differ."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CommandError
from azrecipe.merging.layer_weights import check_weight_sums, resolve_weights
from azrecipe.merging.methods import MergeMethod, merge_tensors
from azrecipe.merging.shard_writer import ShardWriter
from azrecipe.merging.token_rows import TokenRows, align_tokens
from azrecipe.merging.weight_files import WeightFiles, list_weight_names
from azrecipe.modeling.loading import WEIGHT_DTYPES
from azrecipe.modeling.parameter_groups import list_token_parameters
from azrecipe.modeling.weight_checks import is_finite
from azrecipe.recipe.types import MergeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"  # the name of the base among the models; no model of a recipe may have it
DTYPES = {**WEIGHT_DTYPES, "float16": torch.float16}


@dataclass(frozen=True)
class MergePlan:
    """What is merged, checked without weights.

    Attributes:
        method: How tensors are combined.
        target: The name of the model whose configuration, vocabulary and kept rows the merged model has.
        model: That model on the meta device.
        weights: For each model but the base, the weight of each parameter.
        rows: What becomes of each row of the embedding matrices.
        token_names: The names of the weights with a row for each token.
        special_tokens_from: The name of the model whose special tokens are copied; None: none are.
        dtype: The type of the merged weights.
    """

    method: MergeMethod
    target: str
    model: PreTrainedModel
    weights: Mapping[str, Mapping[str, float]]
    rows: TokenRows
    token_names: frozenset[str]
    special_tokens_from: str | None
    dtype: torch.dtype


def plan_merge(config: MergeConfig, models: Mapping[str, PreTrainedModel], tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> MergePlan:
    """Check that models can be merged, and decide what becomes of each weight.

    Args:
        config: The recipe.
        models: The models on the meta device by name, the base under BASE.
        tokenizers: Their tokenizers.

    Raises:
        CommandError: They cannot be merged; the message has every reason.
    """
    target = config.tokenizer_of or next(iter(config.models))
    model = models[target]
    token_names = _list_token_names(model)
    problems = [problem for name, other in models.items() if name != target for problem in _compare_shapes(target, model, name, other)]
    if problems:
        raise CommandError("\n".join(problems))
    weights = {name: resolve_weights(model, name, source) for name, source in config.models.items()}
    method = MergeMethod(config.method, config.density, config.seed)
    if not method.needs_base:
        check_weight_sums(weights)
    rows = align_tokens(tokenizers, target, model.get_input_embeddings().weight.shape[0], config.special_tokens_from)
    if config.special_tokens_from is not None:
        _check_end_of_turn(tokenizers[target], tokenizers[config.special_tokens_from], config.special_tokens_from, target)
    dtype = DTYPES[config.dtype] if config.dtype is not None else model.config.dtype or torch.float32
    return MergePlan(method, target, model, weights, rows, token_names, config.special_tokens_from, dtype)


def _check_end_of_turn(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str, target: str) -> None:
    """Refuse special tokens whose end-of-turn token the vocabulary lacks."""
    if other.eos_token is not None and other.eos_token not in tokenizer.get_vocab():
        raise CommandError(
            f"special_tokens_from: {name} ends its answers with {other.eos_token}, and the vocabulary of {target} has no such token"
        )


def _list_token_names(model: PreTrainedModel) -> frozenset[str]:
    """List the names of the weights that have a row for each token."""
    parameters = {id(parameter) for parameter in list_token_parameters(model, ("embeddings", "head"))}
    return frozenset(name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in parameters)


def _compare_shapes(target: str, model: PreTrainedModel, name: str, other: PreTrainedModel) -> list[str]:
    """List the differences that keep two models from being merged.

    The number of rows of the embedding matrices may differ.
    """
    if other.config.model_type != model.config.model_type:
        return [
            f"{name} is a {other.config.model_type} and {target} a {model.config.model_type}: only models of one architecture are merged"
        ]
    if model.config.tie_word_embeddings and not other.config.tie_word_embeddings:
        return [
            f"{name} has an output matrix of its own, and {target} uses its input embeddings: set tokenizer_of: {name}, or merge others"
        ]
    token_names = _list_token_names(model)
    shapes, other_shapes = ({key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (model, other))
    missing = sorted(shapes.keys() ^ other_shapes.keys())
    if missing:
        where = name if missing[0] in other_shapes else target
        return [f"{name} and {target} have other weights: {len(missing):,} are in one of them only, as {missing[0]} in {where}"]
    different = [key for key, shape in shapes.items() if (other_shapes[key][1:] if key in token_names else other_shapes[key]) != (shape[1:] if key in token_names else shape)]  # fmt: skip
    if different:
        key = different[0]
        rest = f" and {len(different) - 1:,} others" if len(different) > 1 else ""
        return [f"{name} has weights of other shapes than {target}: {key} is {list(other_shapes[key])} and {list(shapes[key])}{rest}"]
    return []


def write_merged_weights(
    plan: MergePlan, files: Mapping[str, WeightFiles], writer: ShardWriter, on_tensor: Callable[[int, int], None] | None = None
) -> None:
    """Merge and write all weights, one tensor after another.

    Args:
        plan: The plan.
        files: The weights of each model by name, the base's under BASE.
        writer: Takes the merged weights.
        on_tensor: Called after each tensor, with the number of tensors that are done and of all.

    Raises:
        CommandError: A weight is NaN or infinite, or is too large for the merged type.
    """
    target = files[plan.target]
    names = [name for name in sorted(list_weight_names(plan.model)) if name in target.files]
    for count, name in enumerate(names, 1):
        merged = _merge_weight(plan, files, name).to(plan.dtype)
        if not is_finite(merged):
            raise CommandError(f"{name}: the merged weight has numbers that are NaN, infinite or too large for {plan.dtype}")
        writer.add(name, merged)
        if on_tensor is not None:
            on_tensor(count, len(names))


def _merge_weight(plan: MergePlan, files: Mapping[str, WeightFiles], name: str) -> torch.Tensor:
    """Merge one weight; buffers are the target's."""
    weights = _list_weights(plan, name)
    if weights is None:
        return files[plan.target].read(name)
    if name in plan.token_names:
        return _merge_token_rows(plan, files, name, weights)
    base = files[BASE].read(name) if plan.method.needs_base else None
    return merge_tensors(plan.method, [files[model].read(name) for model in plan.weights], weights, base, _salt(name))


def _list_weights(plan: MergePlan, name: str) -> Sequence[float] | None:
    """List the models' weights of a parameter; None for a buffer."""
    by_model = [weights.get(name) for weights in plan.weights.values()]
    return None if None in by_model else [weight for weight in by_model if weight is not None]


def _merge_token_rows(plan: MergePlan, files: Mapping[str, WeightFiles], name: str, weights: Sequence[float]) -> torch.Tensor:
    """Merge the rows of shared tokens; keep or copy the others."""
    rows = plan.rows
    merged = files[plan.target].read(name).float()
    if len(rows.merged):
        tensors = [files[model].read(name)[rows.sources[model]] for model in plan.weights]
        base = files[BASE].read(name)[rows.sources[BASE]] if plan.method.needs_base else None
        merged[rows.merged] = merge_tensors(plan.method, tensors, weights, base, _salt(name))
    if plan.special_tokens_from is not None and len(rows.copied):
        merged[rows.copied] = files[plan.special_tokens_from].read(name)[rows.copied_sources].float()
    return merged


def _salt(name: str) -> int:
    return zlib.crc32(name.encode())
