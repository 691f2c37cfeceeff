"""What a phase trains: named groups and patterns, resolved against a real model's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError
from azrecipe.recipe import parameter_groups

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel

# Groups over transformers' names of decoder-only models: Llama, Qwen, Mistral, Gemma, OLMo and their kin.
_PATTERNS = {
    "attention": re.compile(r"\.(self_attn|attn|attention)\."),
    "mlp": re.compile(r"\.(mlp|feed_forward|block_sparse_moe)\."),
    "norms": re.compile(r"norm"),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_MATRIX = {"new_tokens": "embeddings", "new_tokens_head": "head"}


@dataclass(frozen=True)
class Trained:
    """What a phase trains: for each pattern its parameters' count, and the totals.

    `masked` names the matrices ("embeddings", "head") of which only `new_rows` train.
    """

    by_pattern: dict[str, int]
    trainable: int
    total: int
    masked: frozenset[str] = frozenset()
    new_rows: tuple[int, ...] = ()


def freeze(model: PreTrainedModel, patterns: list[str], new_rows: Sequence[int] = ()) -> Trained:
    """Let exactly the parameters that match train; of a matrix that only `new_tokens` matches, `row_gradient_mask` holds the other rows still.

    `new_rows`: the ids of the tokens that the base model's vocabulary lacks. Raises CommandError naming every pattern that matches nothing.
    """
    parameters = dict(model.named_parameters())
    whole: set[str] = set()
    partly: dict[str, set[str]] = {}
    by_pattern, problems = {}, []
    for pattern in patterns:
        matched = matching(model, pattern, parameters)
        if pattern in _MATRIX:
            partly[_MATRIX[pattern]] = matched
            by_pattern[pattern] = _in_rows(parameters, matched, new_rows)
            if not new_rows:
                problems.append(_no_new_tokens(pattern))
            continue
        whole |= matched
        by_pattern[pattern] = sum(_count(parameters[name]) for name in matched)
        if not matched:
            problems.append(_nothing(pattern, parameters))
    if problems:
        raise CommandError("\n".join(f"trainable_parameters: {problem}" for problem in problems))
    rows_only = set().union(*partly.values()) - whole
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in whole or name in rows_only)
    trainable = sum(_count(parameters[name]) for name in whole) + _in_rows(parameters, rows_only, new_rows)
    masked = frozenset(matrix for matrix, names in partly.items() if names & rows_only)
    return Trained(by_pattern, trainable, sum(_count(p) for p in parameters.values()), masked, tuple(new_rows) if masked else ())


def rows_of(model: PreTrainedModel, matrices: Iterable[str]) -> list[Parameter]:
    """The parameters that have a row a token, of the input embeddings ("embeddings") and the output ("head"); a tied one once."""
    modules = [model.get_input_embeddings() if matrix == "embeddings" else model.get_output_embeddings() for matrix in sorted(matrices)]
    return list({id(parameter): parameter for module in modules if module is not None for parameter in module.parameters()}.values())


def decayed(model: PreTrainedModel, masked: Iterable[str] = ()) -> list[str]:
    """Names of the parameters that weight decay belongs on: the matrices of the layers and of an untied head.

    Not on vectors (biases, norms), not on embeddings (of tokens, tied or not, or of positions), and not on a matrix that trains in
    some rows only.
    """
    from torch.nn import Embedding

    embeddings = [p for module in model.modules() if isinstance(module, Embedding) for p in module.parameters()]
    spared = {id(parameter) for parameter in [*embeddings, *rows_of(model, masked)]}
    return [name for name, parameter in model.named_parameters() if _dimensions(parameter) > 1 and id(parameter) not in spared]


def matching(model: PreTrainedModel, pattern: str, parameters: Mapping[str, Parameter]) -> set[str]:
    """Of these parameters of a model, the names that a group or a regular expression means; an adapter's stand where their layer does."""
    if pattern == "all":
        return set(parameters)
    matrix = _MATRIX.get(pattern, pattern)
    if matrix in ("embeddings", "head"):
        own = {id(parameter) for parameter in rows_of(model, [matrix])}
        return {name for name, parameter in parameters.items() if id(parameter) in own}
    layers = _layers(parameters)
    chosen = parameter_groups.layers(pattern, len(set(layers.values())))
    if chosen is not None:
        return {name for name, layer in layers.items() if layer in chosen}
    expression = _PATTERNS.get(pattern) or re.compile(pattern)
    return {name for name in parameters if expression.search(name)}


def _layers(parameters: Iterable[str]) -> dict[str, int]:
    """The number of the decoder layer that a parameter stands in, for those that stand in one."""
    return {name: int(found[1]) for name in parameters if (found := _LAYER.search(name))}


def _nothing(pattern: str, parameters: Mapping[str, Parameter]) -> str:
    if parameter_groups.layers(pattern, 0) is not None:
        count = len(set(_layers(parameters).values()))
        return f"{pattern} matches no parameter of this model: it has {count} layers, layers[0] to layers[{count - 1}]"
    names = "\n  ".join(list(parameters)[:12])
    return f"{pattern} matches no parameter of this model. Its first parameters:\n  {names}"


def _no_new_tokens(pattern: str) -> str:
    return (
        f"{pattern} matches nothing: no token is known to be new. New are those that a recipe's tokenizer has and its model's own lacks, "
        "and after that run those that new_tokens.json in its final/ names"
    )


def _count(parameter: Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed's, of a parameter whose values are elsewhere


def _dimensions(parameter: Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _in_rows(parameters: Mapping[str, Parameter], names: Iterable[str], rows: Sequence[int]) -> int:
    """How many numbers stand in these rows of the parameters named."""
    return sum(_count(parameters[name]) // getattr(parameters[name], "ds_shape", parameters[name].shape)[0] * len(rows) for name in names)
