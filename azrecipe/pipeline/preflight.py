"""Refuse, before any process starts, a launch that cannot work.

All steps of a pipeline are checked before its first one trains for hours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.data import readers
from azrecipe.distributed import backend, cpu_backend, local_storage, requirements
from azrecipe.distributed.attention_choice import AttentionUse, check_attention
from azrecipe.distributed.batch_size import split_batch
from azrecipe.errors import AzrecipeError, CannotRun, CommandError, Problem, RecipeError
from azrecipe.evaluation import lm_harness, output_metrics
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import EvaluateConfig, PretrainConfig, SftConfig, Source, TokenizerConfig
from azrecipe.recipe.yaml_tree import Key, parse_yaml
from azrecipe.utils import environment_variables
from azrecipe.utils.paths import is_local_data

TRAINING_STAGES = ("pretrain", "sft")  # stages that run in several processes; the others run in one


@dataclass(frozen=True)
class LaunchConfig:
    """The launch that an accelerate config and --num-processes describe.

    Attributes:
        config_file: The accelerate config; None for a launch without one.
        distributed_type: accelerate's distributed_type: NO, MULTI_GPU, FSDP, …
        num_processes: Processes on all machines.
        num_machines: Machines.
        parallel_dims: The config's parallelism_config, if it has one.
        zero_stage: DeepSpeed's ZeRO stage.
        reshard: accelerate's fsdp_reshard_after_forward.
    """

    config_file: Path | None
    distributed_type: str
    num_processes: int
    num_machines: int
    parallel_dims: backend.ParallelDims | None = None
    zero_stage: int = 0
    reshard: bool = True

    @property
    def context_parallel_size(self) -> int:
        return self.parallel_dims.context_parallel_size if self.parallel_dims else 1

    @property
    def data_parallel_size(self) -> int:
        return self.num_processes // self.context_parallel_size


def read_launch_config(file: Path | None, num_processes: int | None) -> LaunchConfig:
    """Read the launch that a config file and --num-processes describe."""
    if file is None:
        return LaunchConfig(None, "MULTI_GPU" if (num_processes or 1) > 1 else "NO", num_processes or 1, 1)
    config: Any = parse_yaml(file.read_text(encoding="utf-8"), str(file)).to_plain() or {}
    return LaunchConfig(
        file,
        str(config.get("distributed_type", "NO")),
        num_processes or int(config.get("num_processes", 1)),
        int(config.get("num_machines", 1)),
        _read_parallel_dims(config.get("parallelism_config") or {}),
        int((config.get("deepspeed_config") or {}).get("zero_stage", 2)),
        bool((config.get("fsdp_config") or {}).get("fsdp_reshard_after_forward", True)),
    )


def _read_parallel_dims(config: Mapping[str, Any]) -> backend.ParallelDims | None:
    sizes = [int(config.get(f"parallelism_config_{name}_size", 1)) for name in ("dp_replicate", "dp_shard", "cp")]
    return backend.ParallelDims(*sizes) if config else None


def check_launch(recipes: Sequence[Recipe], launch: LaunchConfig) -> None:
    """Refuse recipes that this launch cannot run, all problems at once.

    Raises RecipeError for wrong recipes, or else CannotRun for what this machine lacks.
    """
    _check_machines(launch)
    local_storage.storage_is_local()
    problems: list[Problem] = []
    missing: list[str] = []
    if any(recipe.stage in TRAINING_STAGES for recipe in recipes):
        missing += _list_backend_problems(launch)
    for recipe in recipes:
        for error in (*_iter_recipe_problems(recipe, launch), *iter_evaluation_problems(recipe)):
            if isinstance(error, RecipeError):
                problems += error.problems
            else:
                missing.append(f"{recipe.path}: {error}")
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    if missing:
        raise CannotRun("\n".join(dict.fromkeys(missing)))


def check_local_files(recipes: Sequence[Recipe]) -> None:
    """Raise RecipeError for local files that are missing."""
    problems = [problem for recipe in recipes for error in _iter_missing_files(recipe) for problem in error.problems]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))


def _check_machines(launch: LaunchConfig) -> None:
    if launch.num_machines > 1:
        raise CommandError(
            f"{launch.config_file} is for {launch.num_machines} machines, and azrecipe run starts processes on this one only. On each machine:\n"
            f"  accelerate launch --config_file {launch.config_file} --machine_rank R --main_process_ip ADDRESS --main_process_port 29500 "
            "-m azrecipe RECIPE [--step STEP [--cell CELL]] --runs-dir DIR\n"
            f"  with one DIR that all of them see, or {environment_variables.STORAGE}=local (docs/backends.md)"
        )


def _list_backend_problems(launch: LaunchConfig) -> list[str]:
    """List why this machine cannot run a sharded config.

    Raises CommandError for a number of processes that does not fit the config.
    """
    if launch.parallel_dims is not None:
        problem = (
            launch.parallel_dims.find_problem(launch.num_processes)
            if launch.distributed_type == "FSDP"
            else "parallelism_config goes with distributed_type: FSDP only"
        )
        if problem:
            raise CommandError(f"{launch.config_file}: {problem}")
    if launch.distributed_type not in ("FSDP", "DEEPSPEED"):
        return []
    if launch.distributed_type == "DEEPSPEED" and not extras.is_installed("deepspeed"):
        return [f"{launch.config_file} needs DeepSpeed: {extras.get_install_command('deepspeed')}"]
    problem = "" if backend.has_accelerator() else cpu_backend.find_problem(launch.distributed_type)
    return [problem] if problem else []


def _iter_recipe_problems(recipe: Recipe, launch: LaunchConfig) -> Iterator[AzrecipeError]:
    """Yield a recipe's problems that show without model and hub."""
    yield from _iter_missing_files(recipe)
    if recipe.stage not in TRAINING_STAGES:
        return
    training = recipe.config.training
    try:
        split_batch(training.global_batch_size, training.per_device_train_batch_size, launch.data_parallel_size)
    except CommandError as error:
        yield recipe.error(str(error), "training", "global_batch_size")
    try:
        requirements.check_context_parallel(launch.context_parallel_size, recipe)
    except RecipeError as error:
        yield error
    config = recipe.config
    new_embeddings = config.tokenizer.new_embeddings if isinstance(config, PretrainConfig) else ""
    adapter = config.adapter if isinstance(config, SftConfig) else ""
    for check in (
        lambda: extras.check_word_vectors(new_embeddings),
        lambda: requirements.check_precision(training.precision, training.use_liger_kernel),
        lambda: requirements.check_compiler(training.torch_compile),
        lambda: check_attention(recipe.config.model.attn_implementation, AttentionUse(recipe.stage, training.precision)),
        lambda: extras.check_trackers(training.report_to),
        lambda: extras.check_adapter(adapter),
        lambda: extras.check_optimizers(optimizer_settings.list_optimizers(recipe.config)),
        lambda: _check_sharded_recipe(recipe, launch),
    ):
        try:
            check()
        except CannotRun as error:
            yield error


def _check_sharded_recipe(recipe: Recipe, launch: LaunchConfig) -> None:
    with contextlib.suppress(CommandError):  # the caller reports a batch that does not divide
        requirements.check_fsdp_limits(recipe.config, launch.distributed_type == "FSDP", launch.data_parallel_size)


def iter_evaluation_problems(recipe: Recipe) -> Iterator[AzrecipeError]:
    """Yield the missing packages and unknown tasks of an evaluation.

    Finding the names of tasks takes some seconds.
    """
    if recipe.stage != "evaluate":
        return
    try:
        check_attention(recipe.config.attn_implementation, AttentionUse("evaluate", recipe.config.precision))
        output_metrics.check_evaluation_packages(recipe.config)
        lm_harness.check_harness_installed(recipe.config)
        lm_harness.Harness(recipe).check_task_names()
    except (CannotRun, RecipeError) as error:
        yield error


def _iter_missing_files(recipe: Recipe) -> Iterator[RecipeError]:
    for source, keys in _iter_sources(recipe):
        try:
            located_source = readers.DataSource(source, recipe.locate(*keys, "path"))
            if is_local_data(source.path):
                readers.list_files(located_source)
        except RecipeError as error:
            yield error


def _iter_sources(recipe: Recipe) -> Iterator[tuple[Source, tuple[Key, ...]]]:
    config = recipe.config
    if isinstance(config, PretrainConfig | TokenizerConfig | SftConfig):
        for i, source in enumerate(config.data.datasets):
            yield source, ("data", "datasets", i)
    if isinstance(config, PretrainConfig | TokenizerConfig | EvaluateConfig):
        for name, validation in config.data.validation.items():
            yield validation, ("data", "validation", name)
    if isinstance(config, TokenizerConfig):
        if config.data.parallel is not None:
            yield config.data.parallel, ("data", "parallel")
        for name, candidate in config.candidates.items():
            if candidate.protect is not None:
                yield candidate.protect, ("candidates", name, "protect")
