"""Rules of optimizers and schedules: a key without effect is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from azrecipe.errors import Problem
from azrecipe.recipe import schema
from azrecipe.recipe.yaml_tree import YamlNode

# A key: the key whose value decides whether it has an effect, and the values with which it has one.
KEY_READERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "decay_ratio": ("lr_scheduler_type", ("warmup_stable_decay",)),
    "min_lr_ratio": ("lr_scheduler_type", ("cosine", "warmup_stable_decay")),
    "warmup_ratio": ("lr_scheduler_type", ("cosine", "linear", "constant_with_warmup", "warmup_stable_decay")),
    "adam_beta1": ("optim", ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "lion_32bit", "lion_8bit")),
    "adam_beta2": ("optim", ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "lion_32bit", "lion_8bit")),
    "adam_epsilon": ("optim", ("adamw_torch_fused", "adamw_torch", "adamw_8bit")),
}


def check_optimizer(root: YamlNode, stage: str) -> Iterator[Problem]:
    """Find keys that their optimizer or schedule does not read.

    They are keys of `training` and of the phases. In `training`, a key with its default is allowed, and so is one that some
    phase reads.
    """
    training, defaults = root.get("training"), _read_defaults(stage)
    phases = root.get("phases")
    loops = [phase for phase in phases.value if isinstance(phase.value, dict)] if phases and isinstance(phases.value, list) else []
    if stage != "pretrain":
        loops = [YamlNode({}, root.location)]
    for key, (selector, readers) in KEY_READERS.items():
        choices = [_resolve_value(selector, loop, training, defaults) for loop in loops]
        if not all(choice in schema.load_schema("common")["$defs"][selector]["enum"] for choice in choices):
            continue  # the schema reports it
        for loop, choice in zip(loops, choices, strict=True):
            phase_value = loop.get(key)
            if phase_value is not None and phase_value.value is not None and choice not in readers:
                yield Problem(phase_value.entry_location, _describe_unread(key, selector, choice, readers))
        shared = training.get(key) if training else None
        is_set = shared is not None and shared.value is not None and shared.value != defaults.get(key)
        if is_set and shared is not None and choices and not any(choice in readers for choice in choices):
            yield Problem(shared.entry_location, _describe_unread(key, selector, choices[0], readers))
    for loop in loops:
        yield from _check_ratios(loop, training, defaults)


def _check_ratios(loop: YamlNode, training: YamlNode | None, defaults: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that warm-up and decay together fit into a phase."""
    if _resolve_value("lr_scheduler_type", loop, training, defaults) != "warmup_stable_decay":
        return
    ratios = [_resolve_value(key, loop, training, defaults) for key in ("warmup_ratio", "decay_ratio")]
    if all(isinstance(ratio, int | float) for ratio in ratios) and sum(ratios) > 1:
        parents = [parent for parent in (loop, training) if parent]
        node = next((node for parent in parents for key in ("decay_ratio", "warmup_ratio") if (node := parent.get(key))), loop)
        yield Problem(node.entry_location, f"warmup_ratio and decay_ratio are {sum(ratios):g} together: more than the whole phase")


def _describe_unread(key: str, selector: str, choice: Any, readers: tuple[str, ...]) -> str:
    return f"{selector}: {choice} reads no {key}. What reads it: {', '.join(readers)}"


def _resolve_value(key: str, loop: YamlNode, training: YamlNode | None, defaults: Mapping[str, Any]) -> Any:
    """Return a key's value in one phase.

    It is the value of the phase, of `training`, or the default.
    """
    for node in (loop.get(key), training.get(key) if training else None):
        if node is not None and node.value is not None:
            return node.value
    return defaults.get(key)


def _read_defaults(stage: str) -> dict[str, Any]:
    training = schema.subschema(schema.load_schema(stage), "training") or {}
    return {key: schema.resolve_ref(definition).get("default") for key, definition in training.get("properties", {}).items()}
