"""Rules of `stage: sft`: conflicting keys, and keys without effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from azrecipe.errors import Problem, did_you_mean, suggest_choices
from azrecipe.recipe import parameter_groups
from azrecipe.recipe.yaml_tree import Key, YamlNode
from azrecipe.utils.paths import is_file, is_folder

CHAT_TEMPLATES = ("keep", "llama3", "chatml", "gemma")


def check_sft(root: YamlNode) -> Iterator[Problem]:
    """Yield the problems of a tree, which may have failed its schema."""
    yield from _check_template(root)
    method, adapter = _get_value(root, "method") or "sft", _get_value(root, "adapter") or "lora"
    if adapter == "none":
        yield from _check_unread(root, "lora", "is the adapter's, and there is none (adapter: none): remove it, or write lora: null")
    if method == "dpo":
        for keys, allowed_value in ((("data", "packing"), False), (("training", "assistant_only_loss"), True)):
            node = root.get(*keys)
            if node is not None and node.value is not allowed_value and isinstance(node.value, bool):
                yield Problem(
                    node.entry_location, f"{keys[-1]}: {str(node.value).lower()} is not for method: dpo, which compares answers alone"
                )
        if (noise := root.get("training", "neftune_noise_alpha")) is not None and noise.value is not None:
            yield Problem(noise.entry_location, "neftune_noise_alpha is not for method: dpo, whose reference would be noisy too")
    elif method == "sft":
        yield from _check_unread(root, "dpo", "is for method: dpo, and method is sft: remove it, or write dpo: null")
    yield from _check_sources(root, method)
    rates = root.get("training", "learning_rates")
    for pattern, node in rates.value.items() if rates and isinstance(rates.value, dict) else ():
        if problem := parameter_groups.find_pattern_problem(pattern):
            yield Problem(node.entry_location, problem)


def _get_value(root: YamlNode, *keys: Key) -> Any:
    node = root.get(*keys)
    return node.value if node is not None else None


def _check_template(root: YamlNode) -> Iterator[Problem]:
    node = root.get("chat_template")
    if node is None or not isinstance(node.value, str) or node.value in CHAT_TEMPLATES:
        return
    if not node.value.endswith(".jinja"):
        advice = f"{suggest_choices(node.value, CHAT_TEMPLATES, 'Templates')}, or the path of a .jinja file"
        yield Problem(node.location, f"there is no chat template '{node.value}'{advice}")
    elif not is_file(node.value):
        parent = Path(node.value).parent
        suggestion = did_you_mean(Path(node.value).name, (p.name for p in parent.glob("*.jinja"))) if is_folder(parent) else ""
        yield Problem(node.location, f"no such file: {node.value}{suggestion}")


def _check_unread(root: YamlNode, key: str, reason: str) -> Iterator[Problem]:
    """Refuse a block that has no effect, also with the default values."""
    node = root.get(key)
    if node is not None and isinstance(node.value, dict) and not node.value:
        yield Problem(node.entry_location, f"{key} {reason}")
    for name, child in node.value.items() if node and isinstance(node.value, dict) else ():
        yield Problem(child.entry_location, f"{key}.{name} {reason}")


def _check_sources(root: YamlNode, method: Any) -> Iterator[Problem]:
    datasets = root.get("data", "datasets")
    sources = datasets.value if datasets and isinstance(datasets.value, list) else []
    sources = [source for source in sources if isinstance(source.value, dict)]
    unweighted = [source for source in sources if source.get("weight") is None]
    if 0 < len(unweighted) < len(sources):
        yield Problem(unweighted[0].entry_location, "this source has no weight, and others have: give each one, or none")
    for source in sources:
        node = source.get("format")
        if node is not None and method in ("sft", "dpo") and node.value != "auto" and (node.value == "preference") != (method == "dpo"):
            reads = "preferences (format: preference)" if method == "dpo" else "conversations"
            yield Problem(node.entry_location, f"format: {node.value} is not for method: {method}, which reads {reads}")
