"""The estimate of a recipe: memory, largest batch, rate, hours, price."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from azrecipe.distributed import requirements
from azrecipe.distributed.requirements import check_quantized
from azrecipe.planning import memory_budget, step_time
from azrecipe.planning.alternatives import Alternative, list_alternatives
from azrecipe.planning.decision import compute_cost, describe_decision
from azrecipe.planning.evaluation_memory import compute_evaluation_budget, find_fitting_eval_batch, get_verdict
from azrecipe.planning.model_config import ModelLookup, ModelShape, resolve_model_shape
from azrecipe.planning.placement import Placement
from azrecipe.planning.simulation.cost_cache import CostCache
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.planning.step_time import StepTime
from azrecipe.planning.training_length import TrainingLength, estimate_training_lengths
from azrecipe.planning.training_loops import PlannedLoop, find_precision_problem, plan_loops
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import SftConfig
from azrecipe.utils.console import format_bytes

SECONDS_PER_HOUR = 3600.0
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")  # of configurations, by family


@dataclass(frozen=True)
class EstimateRequest:
    """A recipe on machines, with its model, its loops and their lengths.

    main_loop: index of the loop that the alternatives will probably be about; costs, which are not known yet, decide.
    with_alternatives: whether alternatives are estimated too.
    notes: what was changed so that the recipe can be planned on these machines.
    """

    recipe: Recipe
    placement: Placement
    model: ModelShape
    loops: list[PlannedLoop]
    lengths: list[TrainingLength]
    main_loop: int
    with_alternatives: bool
    notes: tuple[str, ...] = ()

    def list_alternatives(self, loop_index: int) -> list[Alternative]:
        """List the alternatives of a loop; none unless they are wanted."""
        return list_alternatives(self.recipe.config, self.loops[loop_index], self.placement) if self.with_alternatives else []

    @property
    def steps(self) -> list[tuple[StepSpec, int]]:
        """The steps, with their sequence lengths, whose costs the estimate needs."""
        return _list_steps([*self.loops, *(change.loop for change in self.list_alternatives(self.main_loop))])


def build_request(recipe: Recipe, lookup: ModelLookup, placement: Placement, with_alternatives: bool = True) -> EstimateRequest:
    """Resolve a recipe's model, loops and lengths.

    Args:
        recipe: A pretrain or sft recipe.
        lookup: Where its model is looked for.
        placement: The machines.
        with_alternatives: Whether alternatives are estimated too.

    Raises:
        CommandError: The recipe cannot run on these machines.
        CannotRun: The hub is needed and cannot be reached.
        RecipeError: The recipe, or one that it depends on, is wrong.
    """
    recipe, notes = _fit_global_batch(recipe, placement)
    config = recipe.config
    requirements.check_fsdp_limits(config, placement.backend.uses_fsdp, placement.backend.data_parallel_size)
    check_quantized(config.adapter if isinstance(config, SftConfig) else "", placement.backend)
    model = resolve_model_shape(recipe, lookup)
    _check_positions(recipe, model)
    planned = plan_loops(recipe, model, placement.backend, reshard=placement.reshard, card=placement.machine.card)
    lengths = estimate_training_lengths(recipe, lookup.runs_dir, planned)
    longest = max(range(len(planned)), key=lambda index: (lengths[index].tokens or 0, index))
    notes += _describe_smaller_batches(recipe, planned)
    return EstimateRequest(recipe, placement, model, planned, lengths, longest, with_alternatives, tuple(notes))


def change_recipe(request: EstimateRequest, recipe: Recipe) -> EstimateRequest:
    """Return a request for the same model and machines with another recipe.

    The recipe must have the same loops, as with other batches on a card.
    """
    placement = request.placement
    planned = plan_loops(recipe, request.model, placement.backend, reshard=placement.reshard, card=placement.machine.card)
    return replace(request, recipe=recipe, loops=planned)


def _fit_global_batch(recipe: Recipe, placement: Placement) -> tuple[Recipe, list[str]]:
    """Take the nearest global batch that divides over the processes, and a note."""
    training, processes = recipe.config.training, placement.backend.data_parallel_size
    size = training.global_batch_size
    if size % processes == 0:
        return recipe, []
    nearest = max(processes, round(size / processes) * processes)
    changed = replace(recipe, config=replace(recipe.config, training=replace(training, global_batch_size=nearest)))
    note = (
        f"training.global_batch_size = {size} does not divide over {processes} processes, and a run refuses it: planned with "
        f"--set training.global_batch_size={nearest}"
    )
    return changed, [note]


def _check_positions(recipe: Recipe, model: ModelShape) -> None:
    """Refuse sequences that are longer than the model's positions."""
    limit = next((model.config[key] for key in POSITION_KEYS if isinstance(model.config.get(key), int)), None)
    if limit is not None and recipe.config.data.max_length > limit:
        message = f"data.max_length = {recipe.config.data.max_length:,} is more than the model's {limit:,} positions"
        raise recipe.error(message, "data", "max_length")


def _describe_smaller_batches(recipe: Recipe, loops: Sequence[PlannedLoop]) -> list[str]:
    """Say which batch is used where the recipe's does not divide its share."""
    training = recipe.config.training
    batches = {loop.batch // loop.pairs for loop in loops}
    return [
        f"per_device_train_batch_size: {training.per_device_train_batch_size} is a ceiling: {batch} at once, "
        f"{loops[0].accumulation} times, make up a process' share of {training.global_batch_size}"
        for batch in sorted(batches)
        if batch < training.per_device_train_batch_size
    ]


def _list_steps(planned: Sequence[PlannedLoop]) -> list[tuple[StepSpec, int]]:
    return [(loop.step, loop.length) for loop in planned]


def estimate_recipe(request: EstimateRequest, cache: CostCache) -> dict[str, Any]:
    """Estimate a recipe on its machines, as JSON.

    Raises CommandError for a model that cannot be simulated.
    """
    recipe, placement, planned = request.recipe, request.placement, request.loops
    refusal = find_precision_problem(recipe.config.training.precision, placement.machine.card)
    cache.load_or_simulate_possible(request.steps)  # simulates all steps in parallel; the calls below then read the cache
    costs = cache.load_or_simulate(_list_steps(planned))
    estimates = [_estimate_loop(loop, cost, placement, length) for loop, cost, length in zip(planned, costs, request.lengths, strict=True)]
    if refusal:
        estimates = [{**loop, "verdict": "does not fit"} for loop in estimates]
    estimates = [_leave_out_costs(loop) if loop["verdict"] == "does not fit" else loop for loop in estimates]
    main = _choose_main_loop(estimates)
    loop, cost, base = planned[main], costs[main], estimates[main]
    alternatives = request.list_alternatives(main)
    alternative_costs = cache.load_or_simulate_possible(_list_steps([alternative.loop for alternative in alternatives]))
    best = _find_best_batch(loop, cost, placement)
    changes = [
        _estimate_alternative(option, cost, base, best)
        for option, cost in zip(alternatives, alternative_costs, strict=True)
        if cost is not None
    ]
    if alternatives and best.batch and best.batch != loop.batch // loop.pairs:
        changes.append(_estimate_batch(loop, cost, placement, base=base, best=best))
    notes = dict.fromkeys(
        [
            *([refusal] if refusal else []),
            *_list_measuring_notes(estimates, placement),
            *request.notes,
            *request.model.notes,
            *(note for length in request.lengths for note in length.notes),
            *_list_limits(recipe, placement),
        ]
    )
    answer = {
        "recipe": str(recipe.path),
        "stage": recipe.stage,
        "hardware": placement.title,
        "backend": placement.strategy,
        "processes": placement.world_size,
        "card": {"name": placement.machine.card.name, "bytes": round(placement.card_bytes), "source": placement.machine.card.memory_source},
        "price": _scale_prices(placement),
        "vocab_size": int(request.model.config["vocab_size"]),
        "refusal": refusal,
        "loops": estimates,
        "hours": sum_hours(estimates),
        "levers": {"of": loop.name, "changes": sorted(changes, key=_sort_key)},
        "notes": list(notes),
    }
    return {"decision": describe_decision(answer), **answer}


def _leave_out_costs(loop: dict[str, Any]) -> dict[str, Any]:
    """Leave out hours and price of a loop that cannot run."""
    return {**loop, "hours": None, "hours_without_efa": None, "cost": {"on_demand": None, "spot": None}}


def _list_limits(recipe: Recipe, placement: Placement) -> Iterator[str]:
    """List what the estimate leaves out, or what is not verified."""
    config = recipe.config
    if placement.strategy == "single" and config.training.precision == "bf16_mixed" and getattr(config, "adapter", "none") == "none":
        yield (
            "--accelerate-config fsdp --num-processes 1 was 1.14 times as fast as one process on an H100, one run of each "
            "(docs/performance.md); it is estimated as one process"
        )
    if config.training.torch_compile:
        yield "torch_compile: what its kernels move is counted, the memory that they spare is not"
    if getattr(config.training, "async_sharded_checkpoints", False):
        yield (
            "async_sharded_checkpoints: the copies in main memory (weights and optimizer state, shared by all processes) and the time that "
            "they save are not counted"
        )
    if config.training.trainer_arguments:
        yield f"training.trainer_arguments are left out: {', '.join(config.training.trainer_arguments)}"
    if placement.context_parallel_size > 1:
        yield "sequences split over processes are estimated as shorter ones, without the ring's buffers: not verified"
    if placement.strategy.startswith("zero"):
        yield "DeepSpeed's memory and time come from formulas, not from a simulated step: not verified"
    if isinstance(config, SftConfig) and config.method == "dpo":
        yield "the reference model's forward pass is counted as a forward pass of the model that trains"


def _list_measuring_notes(estimates: Sequence[dict[str, Any]], placement: Placement) -> Iterator[str]:
    """Yield a note for each loop whose measurements may not fit."""
    for loop in estimates:
        most = loop["memory"]["measuring_most"]
        if most is not None and most > placement.card_bytes:
            batch = loop["fitting_eval_batch"]
            advice = f"--set training.per_device_eval_batch_size={batch} fits, and changes no result" if batch else "no batch of it fits"
            yield f"{loop['name']}: measuring on held-out text may need {format_bytes(most)} a card, more than it has: {advice}"


def _choose_main_loop(estimates: Sequence[dict[str, Any]]) -> int:
    """Choose the loop that alternatives are listed for.

    The largest of those that fit at no batch; else the one with the most tokens, as far as they are known.
    """

    def priority(index: int) -> tuple[bool, int, int]:
        loop = estimates[index]
        never_fits = loop["fitting_batch"] == 0
        return never_fits, loop["memory"]["peak"] if never_fits else loop["tokens"] or 0, index

    return max(range(len(estimates)), key=priority)


def _estimate_loop(loop: PlannedLoop, cost: StepCost, placement: Placement, length: TrainingLength) -> dict[str, Any]:
    budget = memory_budget.compute_memory_budget(cost, loop.step, loop.batch, placement.world_size, placement.replicate_size)
    largest = memory_budget.find_largest_batches(cost, loop.step, placement.card_bytes, placement.world_size, placement.replicate_size)
    measuring = compute_evaluation_budget(cost, loop, placement.world_size, placement.context_parallel_size)
    time = _estimate_time(cost, loop, loop.batch, loop.accumulation, placement)
    rate = asdict(time.total.to_rate(loop.count_tokens(placement.backend)))
    hours_by_bound = asdict(time.total.multiply(length.steps / SECONDS_PER_HOUR)) if length.steps else None
    return {
        "name": loop.name,
        "parameters": {key: getattr(cost.parameters, key) for key in ("total", "trainable", "embeddings")},
        "max_length": loop.length * placement.context_parallel_size,
        "per_device_train_batch_size": loop.batch // loop.pairs,
        "gradient_accumulation_steps": loop.accumulation,
        "memory": {
            "parts": {name: round(size) for name, size in budget.parts.items()},
            "peak": round(budget.peak), "least": round(budget.lower_bound), "most": round(budget.upper_bound),
            "measuring": None if measuring is None else round(measuring.peak),
            "measuring_most": None if measuring is None else round(measuring.upper_bound),
        },
        "verdict": get_verdict(budget, measuring, placement.card_bytes),
        "largest_batch": {"surely": largest.certain // loop.pairs, "perhaps": largest.possible // loop.pairs},
        "fitting_batch": _find_best_batch(loop, cost, placement).batch,
        "fitting_eval_batch": find_fitting_eval_batch(
            cost, loop, placement.card_bytes, placement.world_size, placement.context_parallel_size
        ),
        "flops_per_token": cost.count_flops(loop.batch) / (loop.batch * loop.length),
        "step_seconds": asdict(time.total),
        "seconds_by": {"compute": time.compute.middle, "links in a machine": time.intra_node.middle, "network": time.inter_node.middle},
        "bound": time.bottleneck,
        "tokens_per_second": rate,
        "tokens_per_second_per_card": {key: value / placement.world_size for key, value in rate.items()},
        "hours_without_efa": time.total_without_efa * length.steps / SECONDS_PER_HOUR if time.total_without_efa and length.steps else None,
        "rests_on": time.basis,
        "card_is_known": time.has_card,
        "steps": length.steps,
        "tokens": length.tokens,
        "epochs": length.epochs,
        "hours": hours_by_bound,
        "cost": _compute_price(hours_by_bound, placement),
    }  # fmt: skip


@dataclass(frozen=True)
class BestBatch:
    """The largest fitting batch on a device that divides the global batch.

    batch: 0 where none fits. accumulation: its gradient accumulation steps. rate: tokens/s with it.
    """

    batch: int
    accumulation: int
    rate: dict[str, float] | None


def _find_best_batch(loop: PlannedLoop, cost: StepCost, placement: Placement) -> BestBatch:
    split = memory_budget.find_largest_fitting_batch(cost, loop, placement.card_bytes, placement.backend)
    if split is None:
        return BestBatch(0, 0, None)
    time = _estimate_time(cost, loop, split.per_device * loop.pairs, split.accumulation, placement)
    return BestBatch(split.per_device, split.accumulation, asdict(time.total.to_rate(loop.count_tokens(placement.backend))))


def _estimate_time(cost: StepCost, loop: PlannedLoop, batch: int, accumulation: int, placement: Placement) -> StepTime:
    """Estimate a step's time, with DPO's reference pass.

    In units of a forward pass, a step is that one, one for the gradients of activations, one for those of weights (not of an adapter's
    frozen base), and one that is repeated with activation checkpointing.
    """
    time = step_time.estimate_step_time(cost, loop.step, batch, accumulation, placement)
    if loop.pairs == 1:
        return time
    units = 2 + (loop.step.lora is None) + loop.step.activation_checkpointing
    factor = 1 + 1 / units
    slow = None if time.total_without_efa is None else time.total_without_efa * factor
    return replace(time, total=time.total.multiply(factor), compute=time.compute.multiply(factor), total_without_efa=slow)


def _estimate_alternative(alternative: Alternative, cost: StepCost, base: dict[str, Any], base_best: BestBatch) -> dict[str, Any]:
    """Estimate what an alternative changes.

    Memory is compared at the recipe's batch, the rate at the best batch of each.
    """
    loop, placement = alternative.loop, alternative.placement
    budget = memory_budget.compute_memory_budget(cost, loop.step, loop.batch, placement.world_size, placement.replicate_size)
    largest = memory_budget.find_largest_batches(cost, loop.step, placement.card_bytes, placement.world_size, placement.replicate_size)
    best = _find_best_batch(loop, cost, placement)
    return {
        "change": alternative.title,
        "how": alternative.options,
        "peak": round(budget.peak),
        "difference": round(budget.peak - base["memory"]["peak"]),
        "verdict": budget.get_verdict(placement.card_bytes),
        "largest_batch": {"surely": largest.certain // loop.pairs, "perhaps": largest.possible // loop.pairs},
        "best_batch": best.batch,
        "tokens_per_second": best.rate,
        "faster": best.rate["middle"] / base_best.rate["middle"] - 1 if best.rate and base_best.rate else None,
    }


def _estimate_batch(loop: PlannedLoop, cost: StepCost, placement: Placement, *, base: dict[str, Any], best: BestBatch) -> dict[str, Any]:
    """Estimate what the best batch changes against the recipe's batch."""
    changed = replace(loop, batch=best.batch * loop.pairs, step=replace(loop.step, accumulates=best.accumulation > 1))
    options = f"--set training.per_device_train_batch_size={best.batch}"
    alternative = Alternative(f"{best.batch} sequence{'s' if best.batch > 1 else ''} at once", options, changed, placement)
    estimate = _estimate_alternative(alternative, cost, base, best)
    return {**estimate, "faster": best.rate["middle"] / base["tokens_per_second"]["middle"] - 1 if best.rate else None}


def _sort_key(change: dict[str, Any]) -> tuple[bool, float]:
    """Sort changes by rate, those that never fit last."""
    return change["tokens_per_second"] is None, -(change["tokens_per_second"] or {"middle": 0.0})["middle"]


def _scale_prices(placement: Placement) -> dict[str, Any]:
    """Multiply the machine's prices by the number of machines."""
    return {
        name: None
        if price is None
        else {"usd_per_hour": price.usd_per_hour * placement.nodes, "region": price.region, "as_of": price.as_of, "source": price.source}
        for name, price in (("on_demand", placement.machine.price), ("spot", placement.machine.spot))
    }


def _compute_price(duration: dict[str, float] | None, placement: Placement) -> dict[str, dict[str, float] | None]:
    """Compute the price of a duration in hours, in USD."""
    return {name: compute_cost(duration, price) for name, price in _scale_prices(placement).items()}


def sum_pipeline(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum a machine's estimates of a pipeline's recipes, for a comparison."""
    loops = [loop for answer in answers for loop in answer["loops"]]
    return {**{key: answers[0][key] for key in ("hardware", "price")}, "loops": loops, "hours": sum_hours(answers)}


def sum_hours(estimates: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Sum hours of loops or recipes; None where one is unknown."""
    spans = [estimate["hours"] for estimate in estimates]
    return None if any(span is None for span in spans) else {key: sum(span[key] for span in spans) for key in ("low", "middle", "high")}
