"""Knows, before any process is launched, whether the launch can work for every recipe that it is to run.

A pipeline's last step is looked at before its first one trains for hours.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.data import readers
from azrecipe.distributed import backend, cpu_backend, local_storage, requirements
from azrecipe.distributed.batch_size import split
from azrecipe.errors import AzrecipeError, CannotRun, CommandError, Problem, RecipeError
from azrecipe.evaluation import lm_harness, output_metrics
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Source
from azrecipe.recipe.yaml_tree import Key, parse
from azrecipe.utils.paths import is_local_data

TRAINING = ("pretrain", "sft")  # stages that are launched in several processes; the others have no use for more


@dataclass(frozen=True)
class Launch:
    """What an accelerate config (or none) and --num-processes ask for."""

    file: Path | None
    kind: str
    processes: int
    machines: int
    mesh: backend.Mesh | None = None
    zero_stage: int = 0
    reshard: bool = True

    @property
    def context(self) -> int:
        return self.mesh.context if self.mesh else 1


def read(file: Path | None, num_processes: int | None) -> Launch:
    """The launch that a config file and a number of processes describe."""
    if file is None:
        return Launch(None, "MULTI_GPU" if (num_processes or 1) > 1 else "NO", num_processes or 1, 1)
    config: Any = parse(file.read_text(encoding="utf-8"), str(file)).plain() or {}
    return Launch(
        file,
        str(config.get("distributed_type", "NO")),
        num_processes or int(config.get("num_processes", 1)),
        int(config.get("num_machines", 1)),
        _mesh(config.get("parallelism_config") or {}),
        int((config.get("deepspeed_config") or {}).get("zero_stage", 2)),
        bool((config.get("fsdp_config") or {}).get("fsdp_reshard_after_forward", True)),
    )


def _mesh(config: Mapping[str, Any]) -> backend.Mesh | None:
    sizes = [int(config.get(f"parallelism_config_{name}_size", 1)) for name in ("dp_replicate", "dp_shard", "cp")]
    return backend.Mesh(*sizes) if config else None


def check(recipes: Sequence[Recipe], launch: Launch) -> None:
    """Raise RecipeError for recipes that cannot be run so, else CannotRun for what this machine lacks; all at once."""
    _machines(launch)
    local_storage.apart()
    wrong: list[Problem] = []
    lacking: list[str] = []
    trains = [recipe for recipe in recipes if recipe.stage in TRAINING]
    if trains:
        lacking += _backend(launch)
    for recipe in recipes:
        for problem in (*_refusals(recipe, launch), *_evaluation(recipe)):
            if isinstance(problem, RecipeError):
                wrong += problem.problems
            else:
                lacking.append(f"{recipe.path}: {problem}")
    if wrong:
        raise RecipeError(list(dict.fromkeys(wrong)))
    if lacking:
        raise CannotRun("\n".join(dict.fromkeys(lacking)))


def check_data(recipes: Sequence[Recipe]) -> None:
    """Raise RecipeError for local files that are not there."""
    wrong = [problem for recipe in recipes for error in _missing(recipe) for problem in error.problems]
    if wrong:
        raise RecipeError(list(dict.fromkeys(wrong)))


def _machines(launch: Launch) -> None:
    if launch.machines > 1:
        raise CommandError(
            f"{launch.file} is for {launch.machines} machines, and azrecipe run starts processes on this one only. On each machine:\n"
            f"  accelerate launch --config_file {launch.file} --machine_rank R --main_process_ip ADDRESS --main_process_port 29500 "
            "-m azrecipe RECIPE [--step STEP [--cell CELL]] --runs-dir DIR\n"
            f"  with one DIR that all of them see, or {local_storage.SWITCH}=local (docs/backends.md)"
        )


def _backend(launch: Launch) -> list[str]:
    """Why this machine cannot honour a sharded config. Raises CommandError for processes that do not fit its mesh."""
    if launch.mesh is not None:
        wrong = (
            launch.mesh.problem(launch.processes) if launch.kind == "FSDP" else "parallelism_config goes with distributed_type: FSDP only"
        )
        if wrong:
            raise CommandError(f"{launch.file}: {wrong}")
    if launch.kind not in ("FSDP", "DEEPSPEED"):
        return []
    if launch.kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        return [f"{launch.file} needs DeepSpeed: pip install 'azrecipe[deepspeed]'"]
    why = "" if backend.has_accelerator() else cpu_backend.problem(launch.kind)
    return [why] if why else []


def _refusals(recipe: Recipe, launch: Launch) -> Iterator[AzrecipeError]:
    """What is wrong with one recipe, as far as it can be known without loading a model or asking the hub."""
    yield from _missing(recipe)
    if recipe.stage not in TRAINING:
        return
    training = recipe.config.training
    try:
        split(training.global_batch_size, training.per_device_train_batch_size, launch.processes // launch.context)
    except CommandError as error:
        yield recipe.problem(str(error), "training", "global_batch_size")
    try:
        requirements.check_context(launch.context, recipe)
    except RecipeError as error:
        yield error
    tokenizer = getattr(recipe.config, "tokenizer", None)
    for asked in (
        lambda: extras.check_word_vectors(getattr(tokenizer, "new_embeddings", "")),
        lambda: requirements.check_precision(training.precision, training.use_liger_kernel),
        lambda: requirements.check_compiler(training.torch_compile),
        lambda: extras.check_trackers(training.report_to),
        lambda: extras.check_adapter(getattr(recipe.config, "adapter", "")),
        lambda: extras.check_optimizers(optimizer_settings.named(recipe.config)),
        lambda: _sharded(recipe, launch),
    ):
        try:
            asked()
        except CannotRun as error:
            yield error


def _sharded(recipe: Recipe, launch: Launch) -> None:
    with contextlib.suppress(CommandError):  # a batch that does not divide has been told
        requirements.check_sharded(recipe.config, launch.kind == "FSDP", launch.processes // launch.context)


def _evaluation(recipe: Recipe) -> Iterator[AzrecipeError]:
    """What an evaluation at the end of a pipeline lacks: packages, and tasks by their names, which take a while to look up."""
    if recipe.stage != "evaluate":
        return
    try:
        output_metrics.check(recipe.config)
        lm_harness.needed(recipe.config)
        lm_harness.Harness(recipe).check_names()
    except (CannotRun, RecipeError) as error:
        yield error


def _missing(recipe: Recipe) -> Iterator[RecipeError]:
    for source, keys in _sources(recipe):
        try:
            located = readers.Located(source, recipe.place(*keys, "path"))
            if is_local_data(source.path):
                readers.files(located)
        except RecipeError as error:
            yield error


def _sources(recipe: Recipe) -> Iterator[tuple[Source, tuple[Key, ...]]]:
    data = getattr(recipe.config, "data", None)
    for i, source in enumerate(getattr(data, "datasets", ())):
        yield source, ("data", "datasets", i)
    if recipe.stage != "sft":
        for name, source in getattr(data, "validation", {}).items():
            yield source, ("data", "validation", name)
    if recipe.stage == "tokenizer":
        if data is not None and data.parallel is not None:
            yield data.parallel, ("data", "parallel")
        for name, candidate in recipe.config.candidates.items():
            if candidate.protect is not None:
                yield candidate.protect, ("candidates", name, "protect")
