"""`azrecipe plan`: estimate a recipe on machines that are only named."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from azrecipe import hardware
from azrecipe.cli import plan_tables
from azrecipe.distributed.backend import ParallelDims
from azrecipe.errors import AzrecipeError, CannotRun, CommandError
from azrecipe.hardware import Machine, Price
from azrecipe.pipeline import launch_command, preflight
from azrecipe.planning import calibrate, estimate
from azrecipe.planning.estimate import EstimateRequest
from azrecipe.planning.model_config import ModelLookup
from azrecipe.planning.placement import NO_MACHINE, Placement, build_placement, resolve_strategy
from azrecipe.planning.simulation.cost_cache import CostCache
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline, open_recipe
from azrecipe.utils import shipped_files


def plan_recipe_or_pipeline(arguments: Namespace) -> int:
    """`azrecipe plan`: estimate a recipe, or each training step of a pipeline."""
    if arguments.calibrate is not None:
        print(calibrate.calibrate_from_run(arguments.calibrate))
        return 0
    if arguments.recipe is None:
        raise CommandError("which recipe? azrecipe plan RECIPE --hardware NAME")
    path, overrides = shipped_files.resolve_shipped_path(arguments.recipe), parse_overrides(arguments.set)
    recipe, steps = open_recipe(path, overrides, arguments.step, arguments.cell)
    recipes = [step.recipe for step in steps] if recipe.stage == "pipeline" else [recipe]
    siblings = [step.recipe for step in load_pipeline(path, overrides)[1]] if arguments.step else recipes
    _plan_recipes(arguments, recipes, siblings)
    return 0


def _read_launch(name: str | None) -> Placement | None:
    """Read an accelerate config as a placement without machines."""
    if name is None:
        return None
    launch = preflight.read_launch_config(launch_command.resolve_accelerate_config(name), None)
    dims = launch.parallel_dims or ParallelDims()
    strategy = resolve_strategy(launch.distributed_type, dims.replicate_size, launch.zero_stage)
    return Placement(NO_MACHINE, 1, strategy, dims.replicate_size, dims.context_parallel_size, launch.reshard)


def _plan_recipes(arguments: Namespace, recipes: Sequence[Recipe], siblings: Sequence[Recipe]) -> None:
    """Print an estimate for each recipe that trains.

    `siblings` are all recipes of the pipeline. Raises CannotRun where a recipe fits on none of the machines.
    """
    launch = _read_launch(arguments.accelerate_config)
    training = [one for one in recipes if one.stage in preflight.TRAINING_STAGES]
    if not training:
        raise CommandError(
            f"{recipes[0].path}: a {recipes[0].stage} recipe. azrecipe plan takes pretrain and sft recipes, and pipelines with some"
        )
    names = arguments.compare.split(",") if arguments.compare else [arguments.hardware]
    if names == [None]:
        raise CommandError(
            "which machine? --hardware p5.48xlarge, or cards: --hardware 'h100-80g x8'; several: --compare p4d.24xlarge,p5.48xlarge"
        )
    placements = [build_placement(_find_machine(name.strip(), arguments), arguments.nodes, launch) for name in names]
    with_alternatives = not (arguments.compare or arguments.largest_batch or arguments.no_levers) and len(training) == 1
    refusals: list[str] = []

    def refuse(recipe: Recipe, error: AzrecipeError) -> None:
        if len(training) == 1:
            raise error
        refusals.append(str(error) if str(recipe.path) in str(error) else f"{recipe.path}: {error}")

    all_requests: list[list[EstimateRequest]] = []  # a list for each recipe, a request for each machine
    for recipe in training:
        lookup = _build_lookup(arguments, recipe, siblings)
        try:
            all_requests.append([estimate.build_request(recipe, lookup, placement, with_alternatives) for placement in placements])
        except AzrecipeError as error:
            refuse(recipe, error)
    cache = CostCache()
    _simulate_steps(cache, [request for requests in all_requests for request in requests])
    first_requests, estimates = [], []
    for requests in all_requests:
        try:
            estimates.append([estimate.estimate_recipe(request, cache) for request in requests])
            first_requests.append(requests[0])
        except AzrecipeError as error:
            refuse(requests[0].recipe, error)
    _print_estimates(arguments, estimates)
    if len(estimates) > 1 and not (arguments.json or arguments.compare or arguments.largest_batch):
        plan_tables.show_pipeline_total(estimates[0][0], estimate.sum_hours([machines[0] for machines in estimates]))
        print(f"What single changes would do: --step {training[-1].path.name}")
    if not with_alternatives:
        _add_alternatives(first_requests, estimates, cache)
    _raise_if_nothing_fits(estimates, refusals)


def _build_lookup(arguments: Namespace, recipe: Recipe, siblings: Sequence[Recipe]) -> ModelLookup:
    by_name = {sibling.name: sibling for sibling in siblings if sibling.cell in (None, recipe.cell)}
    return ModelLookup(arguments.runs_dir, by_name, arguments.config_json, arguments.vocab_size)


def _simulate_steps(cache: CostCache, requests: Sequence[EstimateRequest]) -> None:
    """Simulate the steps of all recipes and machines in parallel.

    A step that cannot be simulated is refused later, with its recipe.
    """
    with contextlib.suppress(CommandError):
        cache.load_or_simulate([step for request in requests for step in request.steps])


def _add_alternatives(requests: Sequence[EstimateRequest], estimates: Sequence[list[dict[str, Any]]], cache: CostCache) -> None:
    """Add alternatives to recipes that fit nowhere at any batch."""
    repeated = {
        i: replace(requests[i], with_alternatives=True)
        for i, machines in enumerate(estimates)
        if any(_fits_nowhere(machines, loop) and not _find_largest_batch(machines, loop) for loop in range(len(machines[0]["loops"])))
    }
    _simulate_steps(cache, list(repeated.values()))
    for i, request in repeated.items():
        estimates[i][0] = estimate.estimate_recipe(request, cache)


def _print_estimates(arguments: Namespace, estimates: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Print the estimates: for each recipe, one for each machine."""
    if arguments.json:
        flat = [answer for machines in estimates for answer in machines]
        print(json.dumps(flat[0] if len(flat) == 1 else flat, indent=2))
        return
    for machines in estimates:
        if arguments.largest_batch:
            for answer in machines:
                plan_tables.show_largest_batches(answer)
        elif arguments.compare:
            plan_tables.show_machine_comparison(machines)
        else:
            plan_tables.show_plan(machines[0])


def _find_machine(name: str, arguments: Namespace) -> Machine:
    machine = hardware.find_machine(name, arguments.hardware_file)
    if arguments.price_per_hour is not None:
        machine = replace(machine, price=Price(arguments.price_per_hour), spot=None)
    return machine


def _fits_nowhere(machines: Sequence[dict[str, Any]], loop: int) -> bool:
    """Whether a loop fits on none of the machines without a change."""
    return all(answer["loops"][loop]["verdict"] == "does not fit" for answer in machines)


def _find_largest_batch(machines: Sequence[dict[str, Any]], loop: int) -> int:
    """Return the largest batch that certainly fits on a machine.

    Returns 0 where none does.
    """
    return max(int(answer["loops"][loop]["fitting_batch"]) for answer in machines)


def _raise_if_nothing_fits(estimates: Sequence[Sequence[dict[str, Any]]], refusals: Sequence[str]) -> None:
    """Raise CannotRun for refused recipes and for loops that fit nowhere.

    The message names the smallest change that fits.
    """
    messages = list(refusals)
    for machines in estimates:
        for i, loop in enumerate(machines[0]["loops"]):
            if not _fits_nowhere(machines, i):
                continue
            name = f"{machines[0]['recipe']}: {loop['name']}"
            if batch := _find_largest_batch(machines, i):
                messages.append(f"{name} does not fit: --set training.per_device_train_batch_size={batch} does, and accumulates")
                continue
            fitting = [line for line in machines[0]["levers"]["changes"] if line["best_batch"] >= 1]
            if fitting:
                change = min(fitting, key=lambda line: ("vocab" in line["how"] or "max_length" in line["how"], abs(line["difference"])))
                option = f" --set training.per_device_train_batch_size={change['best_batch']}"
                messages.append(f"{name} fits at no batch; with {change['change']} it does: {change['how']}{option}")
            else:
                messages.append(f"{name} fits at no batch, and no single change makes it: more cards (--nodes), larger ones, or an adapter")
    if messages:
        raise CannotRun("\n".join(messages))
