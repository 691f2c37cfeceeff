"""Plan recipes: memory, time and price on machines that are only named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from azrecipe import hardware as machines
from azrecipe.distributed.backend import ParallelDims
from azrecipe.errors import AzrecipeError, CommandError
from azrecipe.hardware import Machine, Price
from azrecipe.operations.selection import select_recipes
from azrecipe.pipeline import launch_command, preflight
from azrecipe.planning import estimate
from azrecipe.planning.estimate import EstimateRequest
from azrecipe.planning.estimate_types import Bounds, LoopEstimate, RecipeEstimate
from azrecipe.planning.model_config import ModelLookup
from azrecipe.planning.placement import NO_MACHINE, Placement, build_placement, resolve_strategy
from azrecipe.planning.simulation.cost_cache import CostCache
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline


@dataclass(frozen=True)
class RecipePlan:
    """The estimates of one recipe.

    Attributes:
        path: The recipe.
        estimates: One for each machine; empty where the recipe was refused.
        refusal: Why it cannot be estimated; "" where it was.
    """

    path: Path
    estimates: tuple[RecipeEstimate, ...]
    refusal: str = ""


@dataclass(frozen=True)
class PlanReport:
    """The plans of a recipe, or of each training step of a pipeline.

    Attributes:
        recipes: The plans, in the order in which the recipes run.
        hours: Hours of all of them on the first machine; None where one is not known.
        problems: Refused recipes, and loops that fit on none of the machines, each with the smallest change that fits.
    """

    recipes: tuple[RecipePlan, ...]
    hours: Bounds | None
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every loop fits on one of the machines."""
        return not self.problems

    @property
    def estimates(self) -> list[tuple[RecipeEstimate, ...]]:
        """The estimates of each recipe that was not refused."""
        return [plan.estimates for plan in self.recipes if plan.estimates]


def plan_recipes(
    recipe: str | Path,
    *,
    hardware: Sequence[str],
    nodes: int = 1,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    step: str | None = None,
    cell: str | None = None,
    accelerate_config: str | None = None,
    config_json: Path | None = None,
    vocab_size: int | None = None,
    hardware_file: Path | None = None,
    price_per_hour: float | None = None,
    with_alternatives: bool = True,
) -> PlanReport:
    """Estimate a recipe, or each training step of a pipeline.

    Args:
        recipe: The path of a pretrain or sft recipe, or of a pipeline.
        hardware: Machines or cards by name: p5.48xlarge, "h100-80g x8".
        nodes: How many of each machine.
        overrides: KEY=VALUE, as `--set` takes them.
        runs_dir: The folder of run directories, where models of finished runs are looked for.
        step: The only step of a pipeline to plan.
        cell: The only cell of a matrix to plan.
        accelerate_config: A file in accelerate_configs/ by name, or a path. None: FSDP, or one process.
        config_json: The base model's config.json, where the hub cannot be reached.
        vocab_size: The size of the vocabulary, whatever the recipe's tokenizer will have.
        hardware_file: A file with further machines, cards and prices.
        price_per_hour: USD for one machine, instead of the list price.
        with_alternatives: Whether single changes are estimated too, for one recipe on one machine.

    Returns:
        The estimates. A loop that fits nowhere is one of the report's problems, and no exception.

    Raises:
        RecipeError: A recipe is wrong.
        CommandError: A machine is not known, the recipe trains nothing, or its only recipe cannot be estimated.
        CannotRun: The hub is needed and cannot be reached.
    """
    training = select_training_recipes(
        recipe, overrides=overrides, step=step, cell=cell, runs_dir=runs_dir, config_json=config_json, vocab_size=vocab_size
    )
    launch = read_launch(accelerate_config)
    if not hardware:
        raise CommandError(
            "which machine? --hardware p5.48xlarge, or cards: --hardware 'h100-80g x8'; several: --compare p4d.24xlarge,p5.48xlarge"
        )
    if price_per_hour is not None and not 0 < price_per_hour < float("inf"):
        raise CommandError(f"price_per_hour must be above 0, not {price_per_hour:g}")
    if nodes < 1 or (vocab_size is not None and vocab_size < 1):
        raise CommandError(f"nodes and vocab_size must be at least 1, not {nodes} and {vocab_size}")
    placements = [build_placement(_find_machine(name.strip(), hardware_file, price_per_hour), nodes, launch) for name in hardware]
    is_single = len(training) == 1
    planner = _Planner(placements, with_alternatives and is_single and len(placements) == 1, is_single)
    for one, lookup in training:
        planner.add_recipe(one, lookup)
    return planner.estimate_recipes()


def select_training_recipes(
    recipe: str | Path,
    *,
    overrides: Sequence[str],
    step: str | None,
    cell: str | None,
    runs_dir: Path,
    config_json: Path | None,
    vocab_size: int | None,
) -> list[tuple[Recipe, ModelLookup]]:
    """Select the recipes that train, each with where its model is looked for.

    Args:
        recipe: The path of a recipe or pipeline.
        overrides: KEY=VALUE, as `--set` takes them.
        step: The only step of a pipeline.
        cell: The only cell of a matrix.
        runs_dir: The folder of run directories.
        config_json: The base model's config.json, where the hub cannot be reached.
        vocab_size: The size of the vocabulary, whatever the recipe's tokenizer will have.

    Raises:
        CommandError: No recipe trains.
    """
    selection = select_recipes(recipe, overrides=overrides, step=step, cell=cell)
    recipes = selection.recipes
    siblings = [s.recipe for s in load_pipeline(selection.path, parse_overrides(overrides))[1]] if step else recipes
    training = [one for one in recipes if one.stage in preflight.TRAINING_STAGES]
    if not training:
        stage = recipes[0].stage
        raise CommandError(
            f"{recipes[0].path}: {'an' if stage == 'evaluate' else 'a'} {stage} recipe. azrecipe plan takes pretrain and sft recipes, "
            "and pipelines with some"
        )
    return [
        (one, ModelLookup(runs_dir, {s.name: s for s in siblings if s.cell in (None, one.cell)}, config_json, vocab_size))
        for one in training
    ]


def read_launch(name: str | None) -> Placement | None:
    """Read an accelerate config as a placement without machines."""
    if name is None:
        return None
    launch = preflight.read_launch_config(launch_command.resolve_accelerate_config(name), None)
    dims = launch.parallel_dims or ParallelDims()
    strategy = resolve_strategy(launch.distributed_type, dims.replicate_size, launch.zero_stage)
    return Placement(NO_MACHINE, 1, strategy, dims.replicate_size, dims.context_parallel_size, launch.reshard)


def _find_machine(name: str, hardware_file: Path | None, price_per_hour: float | None) -> Machine:
    machine = machines.find_machine(name, hardware_file)
    return machine if price_per_hour is None else replace(machine, price=Price(price_per_hour), spot=None)


class _Planner:
    """Estimates recipes on machines, with all steps simulated in parallel.

    A single recipe that is refused raises; one of several is a refusal of the report.
    """

    def __init__(self, placements: Sequence[Placement], with_alternatives: bool, is_single: bool) -> None:
        self._placements, self._with_alternatives, self._is_single = placements, with_alternatives, is_single
        self._recipes: list[Recipe] = []
        self._requests: dict[int, list[EstimateRequest]] = {}  # by the recipe's index: a request for each machine
        self._refusals: dict[int, str] = {}
        self._cache = CostCache()

    def add_recipe(self, recipe: Recipe, lookup: ModelLookup) -> None:
        """Resolve a recipe's model and loops on each machine."""
        index = len(self._recipes)
        self._recipes.append(recipe)
        try:
            self._requests[index] = [estimate.build_request(recipe, lookup, p, self._with_alternatives) for p in self._placements]
        except AzrecipeError as error:
            self._refuse(index, error)

    def estimate_recipes(self) -> PlanReport:
        """Estimate all recipes."""
        self._simulate_steps([request for requests in self._requests.values() for request in requests])
        estimates: dict[int, tuple[RecipeEstimate, ...]] = {}
        for index, requests in self._requests.items():
            try:
                estimates[index] = tuple(self._estimate(request) for request in requests)
            except AzrecipeError as error:
                self._refuse(index, error)
        plans = [
            RecipePlan(recipe.path, estimates.get(index, ()), self._refusals.get(index, "")) for index, recipe in enumerate(self._recipes)
        ]
        hours = estimate.sum_hours([dict(answers[0]) for answers in estimates.values()])
        # In the order in which the recipes were refused: first those that could not be resolved.
        problems = [*self._refusals.values(), *self._find_problems(estimates)]
        return PlanReport(tuple(plans), cast("Bounds | None", hours), tuple(problems))

    def _estimate(self, request: EstimateRequest) -> RecipeEstimate:
        return cast(RecipeEstimate, estimate.estimate_recipe(request, self._cache))

    def _refuse(self, index: int, error: AzrecipeError) -> None:
        if self._is_single:
            raise error
        path = str(self._recipes[index].path)
        self._refusals[index] = str(error) if path in str(error) else f"{path}: {error}"

    def _simulate_steps(self, requests: Sequence[EstimateRequest]) -> None:
        """Simulate the steps of all recipes and machines in parallel.

        A step that cannot be simulated is refused later, with its recipe.
        """
        self._cache.load_or_simulate_possible([step for request in requests for step in request.steps])

    def _find_problems(self, estimates: dict[int, tuple[RecipeEstimate, ...]]) -> list[str]:
        """Describe the loops that fit on no machine, and what makes them fit."""
        fits_at_no_batch = [
            index
            for index, answers in estimates.items()
            if not _is_refused(answers)
            and any(_fits_nowhere(loops) and not _find_largest_batch(loops) for loops in _group_by_loop(answers))
        ]
        repeated = {} if self._with_alternatives else {i: replace(self._requests[i][0], with_alternatives=True) for i in fits_at_no_batch}
        self._simulate_steps(list(repeated.values()))
        problems = []
        for index, answers in estimates.items():
            if _is_refused(answers):
                problems.append(f"{answers[0]['recipe']}: {answers[0]['refusal']}")
                continue
            first = self._estimate(repeated[index]) if index in repeated else answers[0]
            for loops in _group_by_loop(answers):
                if _fits_nowhere(loops):
                    problems.append(_describe_problem(first, answers, loops))
        return problems


def _is_refused(answers: Sequence[RecipeEstimate]) -> bool:
    """Whether a run refuses all of the machines."""
    return all(answer["refusal"] for answer in answers)


def _group_by_loop(answers: Sequence[RecipeEstimate]) -> list[tuple[LoopEstimate, ...]]:
    """Return each loop's estimates, one for each machine."""
    return list(zip(*(answer["loops"] for answer in answers), strict=True))


def _fits_nowhere(loops: Sequence[LoopEstimate]) -> bool:
    """Whether a loop fits on none of the machines without a change."""
    return all(loop["verdict"] == "does not fit" for loop in loops)


def _find_largest_batch(loops: Sequence[LoopEstimate]) -> int:
    """Return the largest batch that certainly fits on a machine.

    Returns 0 where none does, or no measurement.
    """
    return max(0 if loop["fitting_eval_batch"] == 0 else loop["fitting_batch"] for loop in loops)


def _list_fitting_options(loop: LoopEstimate, card_bytes: int) -> list[str]:
    """List the options with which a loop fits at its largest batch."""
    options = []
    if loop["memory"]["most"] > card_bytes:
        options.append(f"--set training.per_device_train_batch_size={loop['fitting_batch']}")
    if (loop["memory"]["measuring_most"] or 0) > card_bytes:
        options.append(f"--set training.per_device_eval_batch_size={loop['fitting_eval_batch']}")
    return options


def _describe_problem(answer: RecipeEstimate, answers: Sequence[RecipeEstimate], loops: Sequence[LoopEstimate]) -> str:
    """Describe a loop that fits nowhere; name the smallest change that fits."""
    name = f"{answer['recipe']}: {loops[0]['name']}"
    if batch := _find_largest_batch(loops):
        best = next(index for index, loop in enumerate(loops) if loop["fitting_batch"] == batch)
        options = _list_fitting_options(loops[best], answers[best]["card"]["bytes"])
        return f"{name} does not fit: {' '.join(options)} does" + (", and accumulates" if "train_batch" in options[0] else "")
    fitting = [change for change in answer["levers"]["changes"] if change["best_batch"] >= 1]
    if not fitting:
        return f"{name} fits at no batch, and no single change makes it: more cards, larger ones, or an adapter"
    change = min(fitting, key=lambda change: ("vocab" in change["how"] or "max_length" in change["how"], abs(change["difference"])))
    option = f" --set training.per_device_train_batch_size={change['best_batch']}"
    return f"{name} fits at no batch; with {change['change'].removeprefix('with ')} it does: {change['how']}{option}"
