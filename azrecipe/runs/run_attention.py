"""The attention of a run: chosen once, kept when it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from azrecipe.distributed.attention_choice import AttentionUse, choose_attention, find_attention_device
from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.yaml_tree import parse_yaml
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.console import print_progress


def settle_attention(recipe: Recipe, use: AttentionUse, run: RunDir) -> Recipe:
    """Replace `auto` in a recipe's config by the attention that the run takes.

    The recipe's data keep `auto`. A run that goes on keeps what it took, where it can.

    Args:
        recipe: The recipe.
        use: What the run needs of its attention.
        run: Its folder.

    Raises:
        CannotRun: The recipe names an attention that cannot run here.
    """
    holder: Any = recipe.config if recipe.stage == "evaluate" else recipe.config.model
    choice = choose_attention(holder.attn_implementation, use, find_attention_device(), read_earlier_attention(run.path))
    if choice.reason:
        print_progress(f"  attention: {choice.name} ({choice.reason})", run.main)
    settled = replace(holder, attn_implementation=choice.name)
    return replace(recipe, config=settled if recipe.stage == "evaluate" else replace(recipe.config, model=settled))


def read_earlier_attention(path: Path) -> str | None:
    """Read the attention that a run's earlier start took.

    None stands for a new run. A run of an azrecipe that did not record it has what its recipe says.
    """
    recorded = (read_json(path / "environment.json") or {}).get("attn_implementation")
    if isinstance(recorded, str):
        return recorded
    file = path / "recipe.yaml"
    if not file.exists():
        return None
    root = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    node = root.get("model", "attn_implementation")
    return node.value if node is not None and isinstance(node.value, str) and node.value != AUTO else None
