"""Benchmark tasks of EleutherAI's lm-evaluation-harness.

Tasks are checked by name or file before anything runs, then run on a loaded model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from azrecipe.errors import AzrecipeError, CannotRun, RecipeError, did_you_mean, get_first_line
from azrecipe.evaluation.task_code import check_task_code, guard_harness
from azrecipe.recipe.extras import check_extra
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import EvaluateConfig, HarnessTask
from azrecipe.utils.atomic_files import hash_file
from azrecipe.utils.bootstrap import Resampling
from azrecipe.utils.paths import is_local_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP_ITERATIONS = 1_000  # for metrics whose standard error the harness has no formula for


def requested_tasks(config: EvaluateConfig) -> list[HarnessTask]:
    """List the recipe's tasks, with defaults where only a name is written."""
    return [HarnessTask(task) if isinstance(task, str) else task for task in config.tasks]


def get_harness_version() -> str:
    """Get the version of the installed lm-evaluation-harness."""
    return importlib.metadata.version("lm-eval")


def check_harness_installed(config: EvaluateConfig) -> None:
    """Check that the harness is installed if a recipe has tasks.

    Raises CannotRun.
    """
    if config.tasks:
        check_extra("harness", "benchmark tasks need lm-evaluation-harness")


@lru_cache
def _load_manager(folders: tuple[str, ...], with_defaults: bool) -> Any:
    """Load lm_eval.TaskManager for task files in folders, once a process.

    `with_defaults` adds the harness' own tasks.
    """
    from lm_eval.tasks import TaskManager

    guard_harness()
    with _quiet():
        return TaskManager(include_path=list(folders) or None, include_defaults=with_defaults)


@dataclass(frozen=True)
class Harness:
    """The benchmark tasks of a recipe.

    Reading the index of the harness' own tasks takes some twenty seconds. Task files need no index.
    """

    recipe: Recipe

    @property
    def _manager(self) -> Any:
        """The harness' task manager for the recipe's tasks."""
        names = [task.task for task in requested_tasks(self.recipe.config)]
        folders = dict.fromkeys(str(Path(name).resolve().parent) for name in names if is_local_task(name))
        return _load_manager(tuple(folders), not all(map(is_local_task, names)))

    def check_task_names(self) -> None:
        """Check that all tasks exist, without their data, and run no code.

        Raises RecipeError with every task that does not exist, and every function of a task file that is not allowed.
        """
        check_task_code(self.recipe)
        problems = []
        for i, task in enumerate(requested_tasks(self.recipe.config)):
            if is_local_task(task.task):
                file = Path(task.task)
                suggestion = did_you_mean(file.name, (p.name for p in file.parent.glob("*.y*ml"))) if file.parent.is_dir() else ""
                message = None if file.is_file() else f"no such task file: {task.task}{suggestion}"
            else:
                known_tasks = self._manager.all_tasks
                suggestion = did_you_mean(task.task, known_tasks) or "."
                unknown = f"lm-evaluation-harness {get_harness_version()} has no task '{task.task}'{suggestion}"
                message = None if task.task in known_tasks else f"{unknown} The name of a task file ends in .yaml"
            if message:
                problems += self.recipe.error(message, "tasks", i).problems
        if problems:
            raise RecipeError(problems)

    def load_tasks(self) -> list[str]:
        """Load every task with its data.

        Returns:
            The names that the tasks have in results.

        Raises:
            RecipeError: The harness cannot load a task file.
            CannotRun: The data of a task cannot be reached.
        """
        self.check_task_names()
        names: list[str] = []
        for i, task in enumerate(requested_tasks(self.recipe.config)):
            loaded = self._load_task(i)
            task_names = [*loaded["groups"]][:1] or [*loaded["tasks"]]
            if task.task in loaded["groups"]:
                task_names = [task.task]
            if duplicates := [name for name in task_names if name in names]:
                raise self.recipe.error(f"two tasks are called '{duplicates[0]}': their results would have one name", "tasks", i)
            names += task_names
        return names

    def hash_inputs(self) -> dict[str, str]:
        """Hash the task files and the data files that they name."""
        hashes = {}
        for i, task in enumerate(requested_tasks(self.recipe.config)):
            if is_local_task(task.task):
                folder = Path(task.task).parent
                files = [Path(task.task)]
                for loaded_task in self._load_task(i)["tasks"].values():
                    files += [folder / name for name in _list_data_files((loaded_task.config.dataset_kwargs or {}).get("data_files"))]
                hashes[f"tasks[{i}]"] = " ".join(hash_file(file)[:16] for file in files if file.is_file())
        return hashes

    def _load_task(self, index: int) -> Any:
        """Load one task as the harness' dict of tasks and groups."""
        task = requested_tasks(self.recipe.config)[index].task
        spec = str(Path(task).resolve()) if is_local_task(task) else task
        try:
            with _quiet(), _working_dir(task):
                return self._manager.load([spec])
        except AzrecipeError:
            raise
        except Exception as error:  # from the harness, datasets, the hub's client or a user's own functions
            reason = get_first_line(error)
            if is_local_task(task) and not isinstance(error, ConnectionError):
                raise self.recipe.error(f"{task}: lm-evaluation-harness cannot load this task: {reason}", "tasks", index) from None
            raise CannotRun(
                f"{self.recipe.locate('tasks', index)}: the data of the task {task} cannot be opened: {reason}\n"
                "  The data are on the Hugging Face hub: they need the network, or the hub's local cache"
            ) from None

    def run_task(self, index: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
        """Run one task, or a group of tasks, on a model.

        Args:
            index: The task's position in the recipe.
            model: The model.
            tokenizer: Its tokenizer.
            batch_size: Requests in a forward pass.

        Returns:
            {"tasks": {name: {"version", "num_fewshot", "questions"}}, "metrics": {name: {metric: {"value", "stderr"}}},
            "values": {name: {metric: its value for each question}}}.
        """
        import torch
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        task, seed = requested_tasks(self.recipe.config)[index], self.recipe.config.seed
        loaded = self._load_task(index)
        for loaded_task in loaded["tasks"].values():  # as lm_eval.simple_evaluate does, which also calls pip and git
            default_fewshot = loaded_task.get_config("num_fewshot")
            if default_fewshot is None or (task.num_fewshot is not None and default_fewshot != 0):
                loaded_task.set_config("num_fewshot", task.num_fewshot or 0)
            loaded_task.set_fewshot_seed(seed=seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with _quiet(), _working_dir(task.task):
            results = evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                task_dict=loaded,
                limit=task.limit,
                apply_chat_template=task.apply_chat_template,
                fewshot_as_multiturn=task.apply_chat_template,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
            )
        descriptions = {
            name: {
                "version": results["versions"].get(name),
                "num_fewshot": results["n-shot"].get(name),
                "questions": (results["n-samples"].get(name) or {}).get("effective"),
                "limit": task.limit,
                "apply_chat_template": task.apply_chat_template,
            }
            for name in results["results"]
        }
        metrics = {name: _parse_metrics(task_metrics) for name, task_metrics in results["results"].items()}
        values = {name: _collect_values(samples, metrics[name]) for name, samples in results["samples"].items() if name in metrics}
        return {"tasks": descriptions, "metrics": metrics, "values": values}


def _parse_metrics(line: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Parse "acc,none" and "acc_stderr,none" into {"acc": {"value", "stderr"}}.

    A filter other than "none" stays in the name.
    """
    metrics = {}
    for key, value in line.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = line.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else key
            metrics[name] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return metrics


def _collect_values(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, list[float]]:
    """Collect the values question by question of metrics that are means."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            if isinstance(sample[metric], (bool, int, float)):
                values[name].append(float(sample[metric]))
    means = {name: metrics[name]["value"] for name in values if name in metrics}
    return {name: values[name] for name, mean in means.items() if mean is not None and abs(float(np.mean(values[name])) - mean) < 1e-9}


def compare_results(results: Mapping[str, Any], baseline: Mapping[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """Compare a model's results with a baseline's on the same questions.

    Args:
        results: What `Harness.run_task` returned for the model.
        baseline: The same for the baseline.
        seed: Of the bootstrap.

    Returns:
        {task: {metric: {"value", "interval"}}}. The interval is None for a metric that is no mean over questions.
    """
    differences: dict[str, dict[str, Any]] = {}
    for name, metrics in results["metrics"].items():
        differences[name] = {}
        for metric, score in metrics.items():
            values, baseline_values = (side["values"].get(name, {}).get(metric, []) for side in (results, baseline))
            if values and len(values) == len(baseline_values):
                resampling, ones = Resampling([str(i) for i in range(len(values))], seed), np.ones(len(values))
                differences[name][metric] = resampling.summarize_difference(
                    resampling.estimate_ratio(np.array(values), ones), resampling.estimate_ratio(np.array(baseline_values), ones)
                )
            else:
                baseline_score = baseline["metrics"].get(name, {}).get(metric)
                differences[name][metric] = {
                    "value": score["value"] - baseline_score["value"] if baseline_score else None,
                    "interval": None,
                }
    return differences


@contextlib.contextmanager
def _working_dir(task: str) -> Iterator[None]:
    """Work in a task file's folder.

    Paths of data files are relative to it.
    """
    with contextlib.chdir(Path(task).resolve().parent) if is_local_task(task) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness' notices off the terminal.

    Its progress bars are hidden too where there is no terminal.
    """
    import datasets

    datasets.disable_progress_bars()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("lm_eval")
    original_level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(original_level)


def _list_data_files(files: Any) -> list[str]:
    """List the file names in `data_files` of datasets.load_dataset.

    It is one name, a list, or either of these by split.
    """
    if isinstance(files, Mapping):
        return [name for inner in files.values() for name in _list_data_files(inner)]
    return [files] if isinstance(files, str) else list(files or ())
