"""What the schema of an sft recipe cannot say: keys that exclude each other, or that nothing would read beside the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from azrecipe.errors import Problem, did_you_mean, hint
from azrecipe.recipe import parameter_groups, schema
from azrecipe.recipe.yaml_tree import Key, Node

TEMPLATES = ("keep", "llama3", "chatml", "gemma")


def check(root: Node) -> Iterator[Problem]:
    """Problems of a merged tree, which may have failed its schema."""
    yield from _template(root)
    method, adapter = _value(root, "method") or "sft", _value(root, "adapter") or "lora"
    if adapter == "none":
        yield from _unread(root, ("lora",), "is the adapter's, and there is none (adapter: none)")
    if method == "dpo":
        for keys, wanted in ((("data", "packing"), False), (("training", "assistant_only_loss"), True)):
            node = root.get(*keys)
            if node is not None and node.value is not wanted and isinstance(node.value, bool):
                yield Problem(node.at, f"{keys[-1]}: {str(node.value).lower()} is not for method: dpo, which compares answers alone")
        if (noise := root.get("training", "neftune_noise_alpha")) is not None and noise.value is not None:
            yield Problem(noise.at, "neftune_noise_alpha is not for method: dpo, whose reference would be noisy too")
    elif method == "sft":
        yield from _unread(root, ("dpo",), "is for method: dpo, and method is sft")
    yield from _sources(root, method)
    rates = root.get("training", "learning_rates")
    for pattern, node in rates.value.items() if rates and isinstance(rates.value, dict) else ():
        if wrong := parameter_groups.problem(pattern):
            yield Problem(node.at, wrong)


def _value(root: Node, *keys: Key) -> Any:
    node = root.get(*keys)
    return node.value if node is not None else None


def _template(root: Node) -> Iterator[Problem]:
    node = root.get("chat_template")
    if node is None or not isinstance(node.value, str) or node.value in TEMPLATES:
        return
    if not node.value.endswith(".jinja"):
        known = f"{hint(node.value, TEMPLATES, 'Templates')}, or the path of a .jinja file"
        yield Problem(node.place, f"there is no chat template '{node.value}'{known}")
    elif not Path(node.value).is_file():
        parent = Path(node.value).parent
        near = did_you_mean(Path(node.value).name, (p.name for p in parent.glob("*.jinja"))) if parent.is_dir() else ""
        yield Problem(node.place, f"no such file: {node.value}{near}")


def _unread(root: Node, keys: tuple[str, ...], why: str) -> Iterator[Problem]:
    """Keys below `keys` that say something else than their default."""
    node = root.get(*keys)
    definition: schema.Schema | None = schema.document("sft")
    for key in keys:
        definition = schema.below(definition or {}, key)
    defaults = (definition or {}).get("properties", {})
    for key, inner in node.value.items() if node and isinstance(node.value, dict) else ():
        if key in defaults and inner.plain() != defaults[key].get("default"):
            yield Problem(inner.at, f"{'.'.join(keys)}.{key} {why}")


def _sources(root: Node, method: Any) -> Iterator[Problem]:
    datasets = root.get("data", "datasets")
    sources = datasets.value if datasets and isinstance(datasets.value, list) else []
    sources = [source for source in sources if isinstance(source.value, dict)]
    without = [source for source in sources if source.get("weight") is None]
    if 0 < len(without) < len(sources):
        yield Problem(without[0].at, "this source has no weight, and others have: give each one, or none")
    for source in sources:
        node = source.get("format")
        if node is not None and method in ("sft", "dpo") and node.value != "auto" and (node.value == "preference") != (method == "dpo"):
            reads = "preferences (format: preference)" if method == "dpo" else "conversations"
            yield Problem(node.at, f"format: {node.value} is not for method: {method}, which reads {reads}")
