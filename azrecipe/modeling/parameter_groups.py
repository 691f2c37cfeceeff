"""Resolve a phase's trainable groups and patterns against a model's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError
from azrecipe.recipe import parameter_groups
from azrecipe.utils.time_limits import match_names

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel

# Groups over transformers' names of decoder-only models: Llama, Qwen, Mistral, Gemma, OLMo and similar ones.
_GROUP_PATTERNS = {
    "attention": re.compile(r"\.(self_attn|attn|attention)\."),
    "mlp": re.compile(r"\.(mlp|feed_forward|block_sparse_moe)\."),
    "norms": re.compile(r"norm"),
}
_LAYER_PATTERN = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_MATRIX_BY_GROUP = {"new_tokens": "embeddings", "new_tokens_head": "head"}


@dataclass(frozen=True)
class TrainableParameters:
    """The parameters that a phase trains, counted by pattern and in total.

    `masked_matrices` names those ("embeddings", "head") of which only `new_rows` train.
    """

    by_pattern: dict[str, int]
    trainable: int
    total: int
    masked_matrices: frozenset[str] = frozenset()
    new_rows: tuple[int, ...] = ()


def set_trainable_parameters(model: PreTrainedModel, patterns: list[str], new_rows: Sequence[int] = ()) -> TrainableParameters:
    """Let exactly the matching parameters of a model train.

    Of a matrix that only `new_tokens` matches, `row_gradient_mask` keeps the other rows unchanged.

    Args:
        model: A model on any device.
        patterns: Names of groups, or regular expressions over parameter names.
        new_rows: Ids of the tokens that the base model's vocabulary lacks.

    Raises:
        CommandError: A pattern matches nothing; the message names every such pattern.
    """
    parameters = dict(model.named_parameters())
    full_names: set[str] = set()
    names_by_matrix: dict[str, set[str]] = {}
    by_pattern, problems = {}, []
    for pattern in patterns:
        try:
            matched = match_parameters(model, pattern, parameters)
        except CommandError as error:
            problems.append(str(error))
            continue
        if pattern in _MATRIX_BY_GROUP:
            names_by_matrix[_MATRIX_BY_GROUP[pattern]] = matched
            by_pattern[pattern] = _count_in_rows(parameters, matched, new_rows)
            if not new_rows:
                problems.append(_explain_no_new_tokens(pattern))
            continue
        full_names |= matched
        by_pattern[pattern] = sum(_count_elements(parameters[name]) for name in matched)
        if not matched:
            problems.append(explain_no_match(pattern, parameters))
    if problems:
        raise CommandError("\n".join(f"trainable_parameters: {problem}" for problem in problems))
    rows_only = set().union(*names_by_matrix.values()) - full_names
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in full_names or name in rows_only)
    trainable = sum(_count_elements(parameters[name]) for name in full_names) + _count_in_rows(parameters, rows_only, new_rows)
    masked = frozenset(matrix for matrix, names in names_by_matrix.items() if names & rows_only)
    return TrainableParameters(
        by_pattern, trainable, sum(_count_elements(p) for p in parameters.values()), masked, tuple(new_rows) if masked else ()
    )


def list_token_parameters(model: PreTrainedModel, matrices: Iterable[str]) -> list[Parameter]:
    """List the parameters that have a row for each token.

    `matrices` holds "embeddings" for the input and "head" for the output. A tied parameter is listed once.
    """
    modules = [model.get_input_embeddings() if matrix == "embeddings" else model.get_output_embeddings() for matrix in sorted(matrices)]
    return list({id(parameter): parameter for module in modules if module is not None for parameter in module.parameters()}.values())


def list_weight_decay_parameters(model: PreTrainedModel, masked_matrices: Iterable[str] = ()) -> list[str]:
    """List the parameters that weight decay applies to.

    These are the matrices of the layers and of an untied head. Vectors (biases, norms), embeddings (of tokens, tied or not, or of
    positions) and matrices that train in some rows only do not decay.
    """
    from torch.nn import Embedding

    embeddings = [p for module in model.modules() if isinstance(module, Embedding) for p in module.parameters()]
    exempt = {id(parameter) for parameter in [*embeddings, *list_token_parameters(model, masked_matrices)]}
    return [name for name, parameter in model.named_parameters() if _count_dimensions(parameter) > 1 and id(parameter) not in exempt]


def match_parameters(model: PreTrainedModel, pattern: str, parameters: Mapping[str, Parameter]) -> set[str]:
    """Find the parameters that a group or a regular expression names.

    An adapter's parameters belong to the layer that they adapt. Raises CommandError for an expression that takes too long.
    """
    if pattern == "all":
        return set(parameters)
    matrix = _MATRIX_BY_GROUP.get(pattern, pattern)
    if matrix in ("embeddings", "head"):
        matched = {id(parameter) for parameter in list_token_parameters(model, [matrix])}
        return {name for name, parameter in parameters.items() if id(parameter) in matched}
    layers = _number_layers(parameters)
    chosen_layers = parameter_groups.parse_layer_range(pattern, len(set(layers.values())))
    if chosen_layers is not None:
        return {name for name, layer in layers.items() if layer in chosen_layers}
    if pattern in _GROUP_PATTERNS:
        return {name for name in parameters if _GROUP_PATTERNS[pattern].search(name)}
    return set(match_names(pattern, parameters, is_whole=False))


def _number_layers(parameters: Iterable[str]) -> dict[str, int]:
    """Map each parameter of a decoder layer to the layer's number."""
    return {name: int(match[1]) for name in parameters if (match := _LAYER_PATTERN.search(name))}


def explain_no_match(pattern: str, parameters: Mapping[str, Parameter]) -> str:
    """Explain that a pattern matches no parameter."""
    if parameter_groups.parse_layer_range(pattern, 0) is not None:
        count = len(set(_number_layers(parameters).values()))
        return f"{pattern} matches no parameter of this model: it has {count} layers, layers[0] to layers[{count - 1}]"
    names = "\n  ".join(list(parameters)[:12])
    return f"{pattern} matches no parameter of this model. Its first parameters:\n  {names}"


def _explain_no_new_tokens(pattern: str) -> str:
    """Explain that a model has no new tokens."""
    return (
        f"{pattern} matches nothing: no token is known to be new. New tokens are those that the recipe's tokenizer has and the model's own "
        "tokenizer lacks. After such a run, new_tokens.json in its final/ names them"
    )


def _count_elements(parameter: Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed's, where another process has the values


def _count_dimensions(parameter: Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _count_in_rows(parameters: Mapping[str, Parameter], names: Iterable[str], rows: Sequence[int]) -> int:
    """Count the numbers in these rows of the named parameters."""
    return sum(
        _count_elements(parameters[name]) // getattr(parameters[name], "ds_shape", parameters[name].shape)[0] * len(rows) for name in names
    )
