"""Trace the runs that trained a model, and find its evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.recipe.load import CELLS_FOLDER
from azrecipe.recipe.yaml_tree import parse_yaml
from azrecipe.runs.reader import RunRecord
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils.paths import is_local_model


@dataclass(frozen=True)
class Lineage:
    """The runs that trained a model, first to last."""

    runs: list[RunRecord]
    base: str | None = None  # the first run's model: a hub id or a folder; None: a new model
    missing_run: str | None = None  # the earlier run that was removed or run again since; the runs before it are unknown

    @property
    def hub_base(self) -> str | None:
        """The hub id of a base model that comes from the hub."""
        return None if self.base is None or is_local_model(self.base) or Path(self.base).is_dir() else self.base


@dataclass(frozen=True)
class ModelEvaluation:
    """A model's name in an evaluate run, and that run."""

    model_name: str
    run: RunRecord


def trace_lineage(run: RunDir) -> Lineage:
    """Follow `output_of` back from a complete run.

    Of a merged model, it follows the one whose vocabulary the merged model has.
    """
    runs = [_read_record(run.path)]
    while True:
        first = runs[0]
        model = _get_model_source(_parse_recipe(first))
        if model.get("output_of") is None:
            return Lineage(runs, model.get("name_or_path"))
        name = Path(model["output_of"]).stem
        upstream_id = (first.status.get("inputs") or {}).get(f"run of {name}.yaml")
        candidates = (_read_record(folder) for folder in _list_upstream_folders(first.path, name))
        upstream = next((record for record in candidates if record.status.get("run_id") == upstream_id is not None), None)
        if upstream is None:
            return Lineage(runs, missing_run=name)
        runs.insert(0, upstream)


def _get_model_source(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return where a recipe's model comes from: name_or_path or output_of."""
    models = recipe.get("models") or {}
    source = models.get(recipe.get("tokenizer_of") or next(iter(models), None)) if recipe.get("stage") == "merge" else recipe.get("model")
    return source or {}


def find_evaluations(run: RunDir) -> list[ModelEvaluation]:
    """Return the complete evaluate runs that measured this run's model.

    They lie in the same project and cell.
    """
    evaluations = []
    for result in sorted(run.path.parent.glob("*/result.json")):
        record = _read_record(result.parent)
        if record.result.get("stage") != "evaluate" or record.status.get("state") != "complete":
            continue
        inputs = record.status.get("inputs") or {}
        for name, source in _parse_recipe(record).get("models", {}).items():
            stem = Path(source.get("output_of") or "").stem
            if stem == run.path.name and inputs.get(f"run of {stem}.yaml") == run.status.get("run_id"):
                evaluations.append(ModelEvaluation(name, record))
    return evaluations


def _read_record(folder: Path) -> RunRecord:
    return RunRecord(folder, folder.name)


def _parse_recipe(record: RunRecord) -> dict[str, Any]:
    """Return a run's recipe. Raises RecipeError for a damaged file."""
    recipe = parse_yaml(record.recipe_text, str(record.path / "recipe.yaml")).to_plain()
    return recipe if isinstance(recipe, dict) else {}


def _list_upstream_folders(run: Path, name: str) -> Iterator[Path]:
    """Yield the folders where a run's upstream run may lie.

    It is in the same folder, or above the cells of a matrix.
    """
    yield run.parent / name
    if run.parent.parent.name == CELLS_FOLDER:
        yield run.parent.parent.parent / name
