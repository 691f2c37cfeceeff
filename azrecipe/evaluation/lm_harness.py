"""Benchmark tasks of EleutherAI's lm-evaluation-harness: found by name or file before anything runs, then run on a loaded model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
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

from azrecipe.errors import AzrecipeError, CannotRun, RecipeError, did_you_mean
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Evaluate, HarnessTask
from azrecipe.utils.atomic_files import sha256
from azrecipe.utils.bootstrap import Resampling
from azrecipe.utils.paths import is_local_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING = "benchmark tasks need lm-evaluation-harness: pip install 'azrecipe[harness]'"
BOOTSTRAPS = 1_000  # of metrics whose standard error the harness has no formula for


def asked(config: Evaluate) -> list[HarnessTask]:
    """The recipe's tasks, those given by name alone with the defaults."""
    return [HarnessTask(task) if isinstance(task, str) else task for task in config.tasks]


def version() -> str:
    """Of the installed lm-evaluation-harness."""
    return importlib.metadata.version("lm-eval")


def needed(config: Evaluate) -> None:
    """Raise CannotRun for a recipe with tasks where the harness is not installed."""
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        raise CannotRun(MISSING)


@lru_cache
def _manager(folders: tuple[str, ...], own: bool) -> Any:
    """lm_eval.TaskManager for task files in some folders and, with `own`, the harness' own tasks; read once by a process."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=list(folders) or None, include_defaults=own)


@dataclass(frozen=True)
class Harness:
    """The tasks of a recipe. Reading the index of the harness' own tasks takes some twenty seconds; task files need none."""

    recipe: Recipe

    @property
    def _manager(self) -> Any:
        names = [task.task for task in asked(self.recipe.config)]
        folders = dict.fromkeys(str(Path(name).resolve().parent) for name in names if is_local_task(name))
        return _manager(tuple(folders), not all(map(is_local_task, names)))

    def check_names(self) -> None:
        """Raise RecipeError for tasks that are not there, all at once; needs no data of theirs."""
        problems = []
        for i, task in enumerate(asked(self.recipe.config)):
            if is_local_task(task.task):
                file = Path(task.task)
                near = did_you_mean(file.name, (p.name for p in file.parent.glob("*.y*ml"))) if file.parent.is_dir() else ""
                message = None if file.is_file() else f"no such task file: {task.task}{near}"
            else:
                known = task.task in self._manager.all_tasks
                message = None if known else f"lm-evaluation-harness {version()} has no task '{task.task}'"
                message = message and f"{message}{did_you_mean(task.task, self._manager.all_tasks) or '.'} A file of your own ends in .yaml"
            if message:
                problems += self.recipe.problem(message, "tasks", i).problems
        if problems:
            raise RecipeError(problems)

    def open(self) -> list[str]:
        """Load every task with its data; returns the names that they have in results.

        Raises RecipeError for task files that the harness cannot load, CannotRun for data that cannot be reached.
        """
        self.check_names()
        names: list[str] = []
        for i, task in enumerate(asked(self.recipe.config)):
            loaded = self._load(i)
            found = [*loaded["groups"]][:1] or [*loaded["tasks"]]
            if task.task in loaded["groups"]:
                found = [task.task]
            if twice := [name for name in found if name in names]:
                raise self.recipe.problem(f"two tasks are called '{twice[0]}': their results would have one name", "tasks", i)
            names += found
        return names

    def inputs(self) -> dict[str, str]:
        """Hashes of task files and of the data files that they name."""
        found = {}
        for i, task in enumerate(asked(self.recipe.config)):
            if is_local_task(task.task):
                folder = Path(task.task).parent
                files = [Path(task.task)]
                for one in self._load(i)["tasks"].values():
                    files += [folder / name for name in _names((one.config.dataset_kwargs or {}).get("data_files"))]
                found[f"tasks[{i}]"] = " ".join(sha256(file)[:16] for file in files if file.is_file())
        return found

    def _load(self, nth: int) -> Any:
        task = asked(self.recipe.config)[nth].task
        spec = str(Path(task).resolve()) if is_local_task(task) else task
        try:
            with _quiet(), _beside(task):
                return self._manager.load([spec])
        except AzrecipeError:
            raise
        except Exception as error:  # of the harness, of datasets, of the hub's client, of a user's own functions
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if is_local_task(task) and not isinstance(error, ConnectionError):
                raise self.recipe.problem(f"{task}: no task that lm-evaluation-harness can load: {reason}", "tasks", nth) from None
            raise CannotRun(
                f"{self.recipe.place('tasks', nth)}: the data of the task {task} cannot be opened: {reason}\n"
                "  They come from the Hugging Face hub and need the network, or the hub's local cache"
            ) from None

    def run(self, nth: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
        """Run one task, or group of them, on a model.

        {"tasks": {name: {"version", "num_fewshot", "questions"}}, "metrics": {name: {metric: {"value", "stderr"}}},
        "values": {name: {metric: its value for each question}}}.
        """
        import torch
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        task, seed = asked(self.recipe.config)[nth], self.recipe.config.seed
        loaded = self._load(nth)
        for one in loaded["tasks"].values():  # as lm_eval.simple_evaluate does, which also asks pip and git about the machine
            own = one.get_config("num_fewshot")
            if own is None or (task.num_fewshot is not None and own != 0):
                one.set_config("num_fewshot", task.num_fewshot or 0)
            one.set_fewshot_seed(seed=seed)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with _quiet(), _beside(task.task):
            found = evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                task_dict=loaded,
                limit=task.limit,
                apply_chat_template=task.apply_chat_template,
                fewshot_as_multiturn=task.apply_chat_template,
                bootstrap_iters=BOOTSTRAPS,
            )
        about = {
            name: {
                "version": found["versions"].get(name),
                "num_fewshot": found["n-shot"].get(name),
                "questions": (found["n-samples"].get(name) or {}).get("effective"),
                "limit": task.limit,
                "apply_chat_template": task.apply_chat_template,
            }
            for name in found["results"]
        }
        metrics = {name: _metrics(line) for name, line in found["results"].items()}
        values = {name: _values(samples, metrics[name]) for name, samples in found["samples"].items() if name in metrics}
        return {"tasks": about, "metrics": metrics, "values": values}


def _metrics(line: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness' "acc,none" and "acc_stderr,none" as {"acc": {"value", "stderr"}}; a filter other than "none" stays in the name."""
    found = {}
    for key, value in line.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = line.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            found[name] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found


def _values(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, list[float]]:
    """A task's metrics question by question, those that are means over questions."""
    found: dict[str, list[float]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            if isinstance(sample[metric], (bool, int, float)):
                found[name].append(float(sample[metric]))
    means = {name: metrics[name]["value"] for name in found if name in metrics}
    return {name: found[name] for name, mean in means.items() if mean is not None and abs(float(np.mean(found[name])) - mean) < 1e-9}


def differences(mine: Mapping[str, Any], baseline: Mapping[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """By task and metric, how much one model is above another on the same questions; no interval where it is no mean over questions."""
    found: dict[str, dict[str, Any]] = {}
    for name, metrics in mine["metrics"].items():
        found[name] = {}
        for metric, measured in metrics.items():
            ours, theirs = (side["values"].get(name, {}).get(metric, []) for side in (mine, baseline))
            if ours and len(ours) == len(theirs):
                resampling, ones = Resampling([str(i) for i in range(len(ours))], seed), np.ones(len(ours))
                found[name][metric] = resampling.difference(
                    resampling.estimate(np.array(ours), ones), resampling.estimate(np.array(theirs), ones)
                )
            else:
                other = baseline["metrics"].get(name, {}).get(metric)
                found[name][metric] = {"value": measured["value"] - other["value"] if other else None, "interval": None}
    return found


@contextlib.contextmanager
def _beside(task: str) -> Iterator[None]:
    """Work in a task file's own folder, so that the data files that it names are found beside it."""
    with contextlib.chdir(Path(task).resolve().parent) if is_local_task(task) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to our own progress: the harness' notices go, its bars too where there is no terminal."""
    import datasets

    datasets.disable_progress_bars()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _names(files: Any) -> list[str]:
    """The file names in a `data_files` of datasets.load_dataset: one, a list, or either by split."""
    if isinstance(files, Mapping):
        return [name for inner in files.values() for name in _names(inner)]
    return [files] if isinstance(files, str) else list(files or ())
