"""Knows which runs led to a model, from its base on, and which evaluations have measured it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.recipe.load import CELLS
from azrecipe.recipe.yaml_tree import parse
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.paths import is_local_model


@dataclass(frozen=True)
class Step:
    """One run: its recipe's name, the resolved recipe, result.json and environment.json."""

    name: str
    run: Path
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def stage(self) -> str:
        return str(self.recipe["stage"])


@dataclass(frozen=True)
class Lineage:
    """The runs that made a model, first to last. `base` is what the first began with: a hub id or a folder; None for a new model.

    `lost` names a run that is no longer there, or has been run anew since: what came before it is not known.
    """

    steps: list[Step]
    base: str | None = None
    lost: str | None = None

    @property
    def hub_base(self) -> str | None:
        return None if self.base is None or is_local_model(self.base) or Path(self.base).is_dir() else self.base


@dataclass(frozen=True)
class Measured:
    """An evaluate run that has measured the model: the model's name in it, and the run."""

    name: str
    step: Step


def of(run: RunDir) -> Lineage:
    """Follow `output_of` back from a complete run."""
    steps, at = [_step(run.path)], run.path
    while True:
        model = steps[0].recipe.get("model") or {}
        if model.get("output_of") is None:
            return Lineage(steps, model.get("name_or_path"))
        name = Path(model["output_of"]).stem
        wanted = (RunDir(at, False, at.parent).status.get("inputs") or {}).get(f"run of {name}.yaml")
        before = next((place for place in _places(at, name) if _id(place) == wanted is not None), None)
        if before is None:
            return Lineage(steps, lost=name)
        at = before
        steps.insert(0, _step(at))


def measured(run: RunDir) -> list[Measured]:
    """The complete evaluate runs of the same project (and cell) that took this very run's model."""
    found = []
    for result in sorted(run.path.parent.glob("*/result.json")):
        if (read_json(result) or {}).get("stage") != "evaluate" or not RunDir(result.parent, False, result.parent).complete:
            continue
        step = _step(result.parent)
        inputs = RunDir(step.run, False, step.run).status.get("inputs") or {}
        for name, source in step.recipe["models"].items():
            stem = Path(source.get("output_of") or "").stem
            if stem == run.path.name and inputs.get(f"run of {stem}.yaml") == run.status.get("run_id"):
                found.append(Measured(name, step))
    return found


def _step(run: Path) -> Step:
    recipe = parse((run / "recipe.yaml").read_text(encoding="utf-8"), str(run / "recipe.yaml")).plain()
    return Step(run.name, run, recipe, read_json(run / "result.json") or {}, read_json(run / "environment.json") or {})


def _places(run: Path, name: str) -> Iterator[Path]:
    """Where a run's upstream may be: beside it, or above the cells of a matrix."""
    yield run.parent / name
    if run.parent.parent.name == CELLS:
        yield run.parent.parent.parent / name


def _id(run: Path) -> str | None:
    found: str | None = RunDir(run, False, run).status.get("run_id")
    return found
