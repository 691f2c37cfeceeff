"""Knows what of a run directory a page reads: each file once, and what is missing or torn is empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, RecipeError
from azrecipe.recipe.yaml_tree import parse
from azrecipe.runs import event_log
from azrecipe.utils.atomic_files import read_json

STEPS = "steps.json"  # in a pipeline's folder: its steps in the order in which they run, and where their runs are


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not. `name` is what a page calls it."""

    path: Path
    name: str

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe; empty for a folder that has none."""
        try:
            read = parse(self.recipe_text, str(self.path / "recipe.yaml")).plain()
        except RecipeError:
            return {}
        return read if isinstance(read, dict) else {}

    @cached_property
    def recipe_text(self) -> str:
        file = self.path / "recipe.yaml"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """result.json, which only a complete run has; of pretraining, what is known before that."""
        found = read_json(self.path / "result.json")
        if found is None and (begun := read_json(self.path / "phases.json")):
            found = {"stage": "pretrain", **begun}
        return found or {}

    @property
    def stage(self) -> str:
        return str(self.recipe.get("stage") or self.result.get("stage") or "")

    @cached_property
    def status(self) -> Mapping[str, Any]:
        return read_json(self.path / "status.json") or {}

    @cached_property
    def state(self) -> str:
        """complete, running, interrupted, failed, or "not run"."""
        return str(self.status.get("state") or ("complete" if self.result else "not run"))

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        return read_json(self.path / "environment.json") or {}

    @cached_property
    def foreseen(self) -> Mapping[str, Any]:
        """plan.json: what its training was to need; empty for a run that none was foreseen of."""
        return read_json(self.path / "plan.json") or {}

    @cached_property
    def parent(self) -> Mapping[str, Any]:
        """How the recipe differs from its parent; empty for a run from before that was kept."""
        return read_json(self.path / "parent.json") or {}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        return event_log.read(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return event_log.lines(self.path / "metrics.jsonl")

    @cached_property
    def bad_batches(self) -> list[dict[str, Any]]:
        return event_log.lines(self.path / "bad_batches.jsonl")

    @cached_property
    def steps(self) -> list[tuple[str, str | None, Run]]:
        """Of a pipeline: each step's key, its cell and its run."""
        listed = (read_json(self.path / STEPS) or {}).get("steps", [])
        found = []
        for step in listed:
            path = self.path.parent / step["run"]
            found.append((step["step"], step["cell"], Run(path, f"{step['cell']}/{path.name}" if step["cell"] else path.name)))
        return found

    @property
    def touched(self) -> float:
        """When what a page shows last changed, as a file's time."""
        names = ("result.json", "status.json", "recipe.yaml", "parent.json", STEPS)
        own = [file.stat().st_mtime for file in (self.path / name for name in names) if file.exists()]
        return max([*own, *(run.touched for _, _, run in self.steps)], default=0.0)


def opened(path: Path, name: str | None = None) -> Run:
    """The run in a folder. Raises CommandError where there is none."""
    run = Run(path, name or f"{path.resolve().parent.name}/{path.resolve().name}")
    if not any((path / file).is_file() for file in ("result.json", "recipe.yaml", STEPS)):
        raise CommandError(f"{path}: no run: there is neither {path / 'recipe.yaml'} nor a result.json")
    return run
