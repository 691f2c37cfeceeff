"""Read the files of a run directory, finished or not.

Each file is read once. A file that is missing or incomplete gives an empty value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from azrecipe.errors import CommandError, RecipeError
from azrecipe.recipe.yaml_tree import parse_yaml
from azrecipe.runs import event_log
from azrecipe.runs.result_types import ComparisonResult, EvaluateResult, MergeResult, PretrainResult, RunPlan, SftResult, TokenizerResult
from azrecipe.utils.atomic_files import read_json

STEPS_FILE = "steps.json"  # in a pipeline's folder: its steps in the order in which they run, and their run directories


@dataclass(frozen=True)
class RunRecord:
    """The content of a run directory, finished or not."""

    path: Path
    name: str  # as a report shows it

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe; empty for a folder without one."""
        try:
            recipe = parse_yaml(self.recipe_text, str(self.path / "recipe.yaml")).to_plain()
        except RecipeError:
            return {}
        return recipe if isinstance(recipe, dict) else {}

    @cached_property
    def recipe_text(self) -> str:
        file = self.path / "recipe.yaml"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """result.json; of an incomplete pretrain run, phases.json."""
        result = read_json(self.path / "result.json")
        if result is None and (phases := read_json(self.path / "phases.json")):
            result = {"stage": "pretrain", **phases}
        return result or {}

    @property
    def tokenizer_result(self) -> TokenizerResult:
        """result.json of a complete tokenizer run. Raises CommandError."""
        return cast(TokenizerResult, self._read_result("tokenizer"))

    @property
    def pretrain_result(self) -> PretrainResult:
        """result.json of a complete pretrain run. Raises CommandError."""
        return cast(PretrainResult, self._read_result("pretrain"))

    @property
    def sft_result(self) -> SftResult:
        """result.json of a complete sft run. Raises CommandError."""
        return cast(SftResult, self._read_result("sft"))

    @property
    def merge_result(self) -> MergeResult:
        """result.json of a complete merge run. Raises CommandError."""
        return cast(MergeResult, self._read_result("merge"))

    @property
    def evaluate_result(self) -> EvaluateResult:
        """result.json of a complete evaluate run. Raises CommandError."""
        return cast(EvaluateResult, self._read_result("evaluate"))

    @property
    def comparison_result(self) -> ComparisonResult:
        """result.json of a pipeline with `compare`. Raises CommandError."""
        return cast(ComparisonResult, self._read_result("pipeline"))

    def _read_result(self, stage: str) -> dict[str, Any]:
        """Read the result.json of a complete run of a stage."""
        result: dict[str, Any] | None = read_json(self.path / "result.json")
        if result is None:
            raise CommandError(f"{self.path}: not complete ({self.state}): there is no result.json")
        if result.get("stage") != stage:
            raise CommandError(f"{self.path}: a run of stage {result.get('stage')}, not {stage}")
        return result

    @property
    def run_plan(self) -> RunPlan | None:
        """plan.json, the estimate before the run; None without one."""
        return cast(RunPlan, self.plan) if self.plan else None

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
    def plan(self) -> Mapping[str, Any]:
        """plan.json, the estimate of the training; empty without one."""
        return read_json(self.path / "plan.json") or {}

    @cached_property
    def parent_diff(self) -> Mapping[str, Any]:
        """parent.json, the recipe's differences from its parent.

        It is empty for a run of an azrecipe that did not write the file.
        """
        return read_json(self.path / "parent.json") or {}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        return event_log.read_events(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return event_log.read_json_lines(self.path / "metrics.jsonl")

    @cached_property
    def bad_batches(self) -> list[dict[str, Any]]:
        return event_log.read_json_lines(self.path / "bad_batches.jsonl")

    @cached_property
    def steps(self) -> list[StepRecord]:
        """The steps of a pipeline, in the order in which they run."""
        records = []
        for step in (read_json(self.path / STEPS_FILE) or {}).get("steps", []):
            path = self.path.parent / step["run"]
            run = RunRecord(path, f"{step['cell']}/{path.name}" if step["cell"] else path.name)
            records.append(StepRecord(step["step"], step["cell"], run))
        return records

    @property
    def modified_time(self) -> float:
        """The latest modification time of the files that a report shows."""
        names = ("result.json", "status.json", "recipe.yaml", "parent.json", STEPS_FILE)
        times = [file.stat().st_mtime for file in (self.path / name for name in names) if file.exists()]
        return max([*times, *(step.run.modified_time for step in self.steps)], default=0.0)


class StepRecord(NamedTuple):
    """A step of a pipeline, and its run."""

    key: str
    cell: str | None  # None: the step runs once
    run: RunRecord


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Return the run in a folder. Raises CommandError without one."""
    run = RunRecord(path, name or f"{path.resolve().parent.name}/{path.resolve().name}")
    if not any((path / file).is_file() for file in ("result.json", "recipe.yaml", STEPS_FILE)):
        raise CommandError(f"{path}: no run: there is neither {path / 'recipe.yaml'} nor a result.json")
    return run
