"""Rank the cells of a matrix by the results of their runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError
from azrecipe.recipe import matrix
from azrecipe.recipe.load import Recipe
from azrecipe.runs.run_dir import is_already_complete, locate_run
from azrecipe.utils.atomic_files import read_json, write_json

START_KEY = "start"
BYTES_TOLERANCE = 0.01
DEFINITIONS = {
    "ranking": "finished cells, lowest bpb first",
    "bpb": "bits per byte on the ranked validation set after the last phase of the cell's last pretrain step",
    "bpb_after": f"bits per byte on every validation set; {START_KEY} is before the first step, in the vocabulary that is trained",
    "bytes": "UTF-8 bytes of text read in training, by the cell's own pretrain steps that led to its model; so are tokens and steps",
    "same_bytes": f"whether those differ from the first finished cell's by no more than {BYTES_TOLERANCE:.0%}, or one step a phase (phases end with whole steps)",
    "training_seconds": "sum of the times between the logged steps of metrics.jsonl, what was done twice because of a resume counted once; "
    "checkpoints included, starting and measuring before and after a phase not",
    "tokens_per_second": "tokens / training_seconds; bytes_per_second likewise",
    "price": "training_seconds in hours x compare.price_per_hour",
}


def rank_cells(pipeline: Recipe, cells: Mapping[str, Sequence[Recipe]], runs_dir: Path, failed: Mapping[str, int]) -> dict[str, Any]:
    """Compare all cells, finished or not.

    Args:
        pipeline: The pipeline with the matrix.
        cells: The recipes of each cell.
        runs_dir: The folder of run directories.
        failed: Exit codes of the cells that failed in this call.

    Returns:
        The content of the pipeline's result.json.
    """
    settings, dataset = pipeline.config.compare, matrix.get_ranking_dataset(pipeline, cells)
    rows, unfinished = [], []
    for name, recipes in cells.items():
        state = _describe_unfinished_cell(recipes, runs_dir, failed.get(name))
        if state is None:
            row = _build_row(matrix.select_lineage(recipes), runs_dir)
            row["bpb"] = list(row["bpb_after"].values())[-1][dataset]
            if settings.price_per_hour is not None:
                row["price"] = round(row["training_seconds"] / 3600 * settings.price_per_hour, 2)
            rows.append({"cell": name, **row})
        else:
            unfinished.append({"cell": name, **state})
    bytes_per_step = [row.pop("bytes_per_step") for row in rows]
    for row, step_bytes in zip(rows, bytes_per_step, strict=True):
        row["same_bytes"] = abs(row["bytes"] - rows[0]["bytes"]) <= max(step_bytes, bytes_per_step[0], BYTES_TOLERANCE * rows[0]["bytes"])
    return {
        "stage": "pipeline",
        "metric": settings.metric,
        "dataset": dataset,
        "ranking": sorted(rows, key=lambda row: row["bpb"]),
        "unfinished": unfinished,
        "definitions": DEFINITIONS,
    }


def write_ranking(pipeline: Recipe, runs_dir: Path, result: Mapping[str, Any]) -> None:
    """Write a comparison as the pipeline's result.json.

    A file with the same content is not rewritten.
    """
    file = locate_run(pipeline, runs_dir).path / "result.json"
    if read_json(file) != result:
        write_json(file, result)


def _describe_unfinished_cell(recipes: Sequence[Recipe], runs_dir: Path, code: int | None) -> dict[str, Any] | None:
    """Describe the first incomplete step of a cell.

    Returns None for a finished cell.
    """
    for recipe in recipes:
        try:
            if is_already_complete(recipe, runs_dir):
                continue
        except CommandError as error:
            return {"state": "refused", "step": recipe.path.name, "exit_code": error.exit_code, "message": str(error)}
        status = locate_run(recipe, runs_dir).status
        state = "failed" if code is not None else status.get("state", "not run")
        code = code if code is not None else status.get("exit_code")
        return {"state": state, "step": recipe.path.name, "exit_code": code, "message": status.get("message") or ""}
    return None


def _build_row(chain: Sequence[Recipe], runs_dir: Path) -> dict[str, Any]:
    """Build a finished cell's row from the results of its recipes."""
    runs = [locate_run(recipe, runs_dir).path for recipe in chain]
    results = [read_json(run / "result.json") for run in runs]
    bpb = {START_KEY: results[0]["bpb"].get("new_vocabulary") or results[0]["bpb"].get("base")}
    for recipe, result in zip(chain, results, strict=True):
        for phase in result["phases"]:
            bpb[phase if phase not in bpb else f"{recipe.name}: {phase}"] = result["bpb"][phase]
    phases = [phase for result in results for phase in result["phases"].values()]
    total = {key: sum(phase[key] for phase in phases) for key in ("bytes", "tokens", "steps")}
    seconds = sum(_sum_training_seconds(run, result["phases"]) for run, result in zip(runs, results, strict=True))
    return {
        "bpb": None,
        "bpb_after": {after: values for after, values in bpb.items() if values},
        "vocab_size": results[-1].get("vocab_size"),
        "parameters": results[-1]["parameters"],
        **total,
        "bytes_per_step": sum(phase["bytes"] / phase["steps"] for phase in phases),
        "training_seconds": round(seconds, 4),
        "tokens_per_second": round(total["tokens"] / seconds, 1),
        "bytes_per_second": round(total["bytes"] / seconds, 1),
    }


def _sum_training_seconds(run: Path, phases: Mapping[str, Any]) -> float:
    """Sum the training time of a run's phases, in seconds.

    It is computed from the speeds in metrics.jsonl: result.json has the part since the last resume only. Steps after a phase's
    last logged one count at its median speed.
    """
    logged: dict[str, list[tuple[int, float]]] = {phase: [] for phase in phases}  # tokens up to a step, tokens a second up to it
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line.get("phase") in logged and line.get("tokens_per_second"):
            logged[line["phase"]].append((line["tokens"], line["tokens_per_second"]))
    total = 0.0
    for phase, lines in logged.items():
        before = 0
        for tokens, speed in lines:
            total += (tokens - before) / speed
            before = tokens
        if lines:
            total += (phases[phase]["tokens"] - before) / statistics.median(speed for _, speed in lines)
    return max(total, 1e-9)
