"""Rank all machines by what a recipe costs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from azrecipe import hardware as machines
from azrecipe.errors import AzrecipeError, CommandError, suggest_choices
from azrecipe.hardware import Machine
from azrecipe.operations.plan import read_launch, select_training_recipes
from azrecipe.planning import estimate
from azrecipe.planning.decision import compute_cost
from azrecipe.planning.estimate import EstimateRequest
from azrecipe.planning.placement import build_placement
from azrecipe.planning.simulation.cost_cache import CostCache

NODE_HOURS = "node_hours"  # of a machine whose hours are allotted, not sold


@dataclass(frozen=True)
class RankedMachine:
    """Machines on which every step of a recipe or pipeline fits.

    Attributes:
        name: The machines, as a plan names them.
        provider: Who has them.
        batches: Sequences on a card, for each training loop; at most the recipe's.
        hours: Low, middle and high.
        cost: USD, or hours of machines where these are allotted.
        unit: USD or node-hours.
        priced: Region and day of the price.
        rests_on: What the time rests on.
        card_is_known: Whether a published run on such a card is known.
    """

    name: str
    provider: str
    batches: tuple[int, ...]
    hours: Mapping[str, float]
    cost: Mapping[str, float]
    unit: str
    priced: str
    rests_on: str
    card_is_known: bool


@dataclass(frozen=True)
class MachineRanking:
    """The machines, cheapest first, and why others are missing."""

    recipe: Path
    machines: tuple[RankedMachine, ...]
    left_out: Mapping[str, int]  # machines by the reason


def rank_machines(
    recipe: str | Path,
    *,
    nodes: int = 1,
    overrides: Sequence[str] = (),
    runs_dir: Path = Path("runs"),
    step: str | None = None,
    cell: str | None = None,
    accelerate_config: str | None = None,
    config_json: Path | None = None,
    vocab_size: int | None = None,
    hardware_file: Path | None = None,
    within_hours: float | None = None,
    providers: Sequence[str] = (),
) -> MachineRanking:
    """Rank the machines of all providers by what a recipe costs on them.

    Where the recipe's batch does not surely fit, the largest one that does and that divides the global batch is taken.

    Args:
        recipe: The path of a pretrain or sft recipe, or of a pipeline.
        nodes: How many of each machine.
        overrides: KEY=VALUE, as `--set` takes them.
        runs_dir: The folder of run directories.
        step: The only step of a pipeline to plan.
        cell: The only cell of a matrix to plan.
        accelerate_config: A file in accelerate_configs/; None: FSDP, or one process.
        config_json: The base model's config.json, where the hub cannot be reached.
        vocab_size: The size of the vocabulary.
        hardware_file: A file with further machines, cards and prices.
        within_hours: Leave out machines that may need longer.
        providers: Only machines of these; empty: of all.

    Raises:
        CommandError: A provider is not known, the recipe trains nothing, or it fits on no machine.
        RecipeError: A recipe is wrong.
        CannotRun: The hub is needed and cannot be reached.
    """
    selected = select_training_recipes(
        recipe, overrides=overrides, step=step, cell=cell, runs_dir=runs_dir, config_json=config_json, vocab_size=vocab_size
    )
    launch = read_launch(accelerate_config)
    ranking = _Ranking(CostCache())
    requests: list[tuple[Machine, list[EstimateRequest]]] = []
    last_refusal: AzrecipeError | None = None
    for machine in _list_machines(hardware_file, providers):
        if machine.price is None and machine.billed_in != NODE_HOURS:
            ranking.leave_out("no price is known")
            continue
        try:
            placement = build_placement(machine, nodes, launch)
            requests.append(
                (machine, [estimate.build_request(one, lookup, placement, with_alternatives=False) for one, lookup in selected])
            )
        except CommandError as error:
            last_refusal = error
            ranking.leave_out("the recipe cannot run on it")
    if not requests and last_refusal is not None:
        raise last_refusal
    ranking.simulate([request for _, of_machine in requests for request in of_machine])
    for machine, of_machine in requests:
        ranking.add(machine, of_machine, within_hours)
    ordered = sorted(ranking.ranked, key=lambda one: (one.unit != "USD", one.cost["middle"]))
    return MachineRanking(selected[0][0].path, tuple(ordered), ranking.left_out)


def _list_machines(hardware_file: Path | None, providers: Sequence[str]) -> list[Machine]:
    catalog = machines.load_catalog(hardware_file).machines
    known = {machine.provider for machine in catalog.values() if machine.provider}
    for provider in providers:
        if provider not in known:
            raise CommandError(f"no machine of a provider '{provider}' is known{suggest_choices(provider, sorted(known), 'Providers')}")
    return [machine for machine in catalog.values() if not providers or machine.provider in providers]


class _Ranking:
    """Estimates machines one by one, with all steps simulated at once."""

    def __init__(self, cache: CostCache) -> None:
        self.ranked: list[RankedMachine] = []
        self.left_out: dict[str, int] = {}
        self._cache = cache

    def leave_out(self, reason: str) -> None:
        """Count a machine that is not ranked."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def simulate(self, requests: Sequence[EstimateRequest]) -> None:
        """Simulate the steps of all machines in parallel; many share one."""
        self._cache.load_or_simulate_possible([step for request in requests for step in request.steps])

    def add(self, machine: Machine, requests: Sequence[EstimateRequest], within_hours: float | None) -> None:
        """Estimate a machine, and rank it if every step fits on it."""
        answers = [self._estimate(request) for request in requests]
        if any(answer is None for answer in answers):
            self.leave_out("does not fit")
            return
        total = estimate.sum_pipeline([answer for answer in answers if answer is not None])
        if total["hours"] is None:
            self.leave_out("the length of the training is not known")
        elif within_hours is not None and total["hours"]["high"] > within_hours:
            self.leave_out(f"may need more than {within_hours:g} hours")
        else:
            self.ranked.append(_rank(machine, requests[0].placement.nodes, total))

    def _estimate(self, request: EstimateRequest) -> dict[str, Any] | None:
        """Estimate a recipe at a batch that surely fits; None without one."""
        answer = estimate.estimate_recipe(request, self._cache)
        if answer["refusal"]:
            return None
        if all(loop["verdict"] == "fits" for loop in answer["loops"]):
            return answer
        batch = min(loop["fitting_batch"] for loop in answer["loops"])
        eval_batches = [loop["fitting_eval_batch"] for loop in answer["loops"] if loop["fitting_eval_batch"] is not None]
        if batch < 1 or 0 in eval_batches:
            return None
        changes = {"per_device_train_batch_size": batch, **({"per_device_eval_batch_size": min(eval_batches)} if eval_batches else {})}
        recipe = request.recipe
        training = replace(recipe.config.training, **changes)
        smaller = estimate.change_recipe(request, replace(recipe, config=replace(recipe.config, training=training)))
        answer = estimate.estimate_recipe(smaller, self._cache)
        return answer if all(loop["verdict"] == "fits" for loop in answer["loops"]) else None


def _rank(machine: Machine, nodes: int, total: Mapping[str, Any]) -> RankedMachine:
    hours, price = total["hours"], total["price"]["on_demand"]
    by_node_hours = machine.billed_in == NODE_HOURS
    return RankedMachine(
        name=total["hardware"],
        provider=machine.provider or "your own",
        batches=tuple(loop["per_device_train_batch_size"] for loop in total["loops"]),
        hours=hours,
        cost={key: value * nodes for key, value in hours.items()} if by_node_hours else compute_cost(hours, price) or {},
        unit="node-hours" if by_node_hours else "USD",
        priced="" if by_node_hours else ", ".join(part for part in (price["region"], price["as_of"]) if part),
        rests_on=total["loops"][0]["rests_on"],
        card_is_known=total["loops"][0]["card_is_known"],
    )
