"""What a phase trains: named groups and patterns, resolved against a real model's parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel

# Groups over transformers' names of decoder-only models: Llama, Qwen, Mistral, Gemma, OLMo and their kin.
_PATTERNS = {
    "attention": re.compile(r"\.(self_attn|attn|attention)\."),
    "mlp": re.compile(r"\.(mlp|feed_forward|block_sparse_moe)\."),
    "norms": re.compile(r"norm"),
}


@dataclass(frozen=True)
class Trained:
    """What a phase trains: for each pattern its parameters' count, and the totals."""

    by_pattern: dict[str, int]
    trainable: int
    total: int


def freeze(model: PreTrainedModel, patterns: list[str]) -> Trained:
    """Let exactly the parameters that match train. Raises CommandError naming every pattern that matches nothing."""
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    by_pattern = {}
    missing = []
    for pattern in patterns:
        matched = {name for name, parameter in parameters.items() if _matcher(model, pattern)(name, parameter)}
        if not matched:
            missing.append(pattern)
        by_pattern[pattern] = sum(parameters[name].numel() for name in matched)
        chosen |= matched
    if missing:
        names = "\n  ".join(list(parameters)[:12])
        raise CommandError(
            f"trainable_parameters: {', '.join(missing)} matches no parameter of this model. Its first parameters:\n  {names}"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return Trained(by_pattern, sum(parameters[name].numel() for name in chosen), sum(p.numel() for p in parameters.values()))


def _matcher(model: PreTrainedModel, pattern: str) -> Callable[[str, Parameter], bool]:
    if pattern == "all":
        return lambda _name, _parameter: True
    if pattern in ("embeddings", "head"):
        module = model.get_input_embeddings() if pattern == "embeddings" else model.get_output_embeddings()
        own = {id(p) for p in module.parameters()} if module is not None else set()
        return lambda _name, parameter: id(parameter) in own
    expression = _PATTERNS.get(pattern) or re.compile(pattern)
    return lambda name, _parameter: expression.search(name) is not None
