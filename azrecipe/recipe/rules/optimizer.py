"""Knows which keys of an optimizer and of a learning rate's schedule are read together; one that nothing reads is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from azrecipe.errors import Problem
from azrecipe.recipe import schema
from azrecipe.recipe.yaml_tree import Node

# A key, the key whose value decides whether it is read, and the values that read it.
READ_BY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "decay_ratio": ("lr_scheduler_type", ("warmup_stable_decay",)),
    "min_lr_ratio": ("lr_scheduler_type", ("cosine", "warmup_stable_decay")),
    "warmup_ratio": ("lr_scheduler_type", ("cosine", "linear", "constant_with_warmup", "warmup_stable_decay")),
    "adam_beta1": ("optim", ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "lion_32bit", "lion_8bit")),
    "adam_beta2": ("optim", ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "lion_32bit", "lion_8bit")),
    "adam_epsilon": ("optim", ("adamw_torch_fused", "adamw_torch", "adamw_8bit")),
}


def check(root: Node, stage: str) -> Iterator[Problem]:
    """Keys of `training` and of the phases that their optimizer or schedule does not read.

    In `training` a key that holds its default says nothing, and one that some phase reads is needed.
    """
    training, defaults = root.get("training"), _defaults(stage)
    phases = root.get("phases")
    loops = [phase for phase in phases.value if isinstance(phase.value, dict)] if phases and isinstance(phases.value, list) else []
    if stage != "pretrain":
        loops = [Node({}, root.place)]
    for key, (by, readers) in READ_BY.items():
        chosen = [_value(by, loop, training, defaults) for loop in loops]
        if not all(choice in schema.document("common")["$defs"][by]["enum"] for choice in chosen):
            continue  # the schema says so
        for loop, choice in zip(loops, chosen, strict=True):
            own = loop.get(key)
            if own is not None and own.value is not None and choice not in readers:
                yield Problem(own.at, _unread(key, by, choice, readers))
        shared = training.get(key) if training else None
        said = shared is not None and shared.value is not None and shared.value != defaults.get(key)
        if said and shared is not None and chosen and not any(choice in readers for choice in chosen):
            yield Problem(shared.at, _unread(key, by, chosen[0], readers))
    for loop in loops:
        yield from _room(loop, training, defaults)


def _room(loop: Node, training: Node | None, defaults: Mapping[str, Any]) -> Iterator[Problem]:
    """A warm-up and a decay that both fit into one phase."""
    if _value("lr_scheduler_type", loop, training, defaults) != "warmup_stable_decay":
        return
    shares = [_value(key, loop, training, defaults) for key in ("warmup_ratio", "decay_ratio")]
    if all(isinstance(share, int | float) for share in shares) and sum(shares) > 1:
        at = next(
            (node for where in (loop, training) if where for key in ("decay_ratio", "warmup_ratio") if (node := where.get(key))), loop
        )
        yield Problem(at.at, f"warmup_ratio and decay_ratio are {sum(shares):g} together: more than the whole phase")


def _unread(key: str, by: str, choice: Any, readers: tuple[str, ...]) -> str:
    return f"{by}: {choice} reads no {key}. What reads it: {', '.join(readers)}"


def _value(key: str, loop: Node, training: Node | None, defaults: Mapping[str, Any]) -> Any:
    """What a key holds in one loop: the phase's own value, training's, or the default."""
    for node in (loop.get(key), training.get(key) if training else None):
        if node is not None and node.value is not None:
            return node.value
    return defaults.get(key)


def _defaults(stage: str) -> dict[str, Any]:
    own = schema.below(schema.document(stage), "training") or {}
    return {key: schema.follow(definition).get("default") for key, definition in own.get("properties", {}).items()}
