"""Knows how to put together what is to be said of a loop on some machines: memory, the largest batch, rate, hours, price."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from azrecipe.distributed import requirements
from azrecipe.distributed.requirements import check_quantized
from azrecipe.planning import memory_budget, step_time
from azrecipe.planning.alternatives import Lever, levers
from azrecipe.planning.model_config import Around, ModelShape, shape_of
from azrecipe.planning.placement import Where
from azrecipe.planning.simulation.cost_cache import Estimates
from azrecipe.planning.simulation.step_cost import Cost
from azrecipe.planning.simulation.step_spec import Asked
from azrecipe.planning.training_length import Amount, amounts
from azrecipe.planning.training_loops import Loop, loops
from azrecipe.recipe.load import Recipe

HOUR = 3600.0


@dataclass(frozen=True)
class Question:
    """A pretrain or sft recipe on some machines: its model, its loops and how long they are, and the changes of the loop that most is about.

    likely: that loop, as far as can be said before costs are known; look_at_levers: whether changes are asked for.
    """

    recipe: Recipe
    where: Where
    shape: ModelShape
    loops: list[Loop]
    amounts: list[Amount]
    likely: int
    look_at_levers: bool

    def levers(self, nth: int) -> list[Lever]:
        """The changes of a loop."""
        return levers(self.recipe.config, self.loops[nth], self.where) if self.look_at_levers else []

    @property
    def steps(self) -> list[tuple[Asked, int]]:
        """What the answer will want to know the costs of."""
        return _steps([*self.loops, *(change.loop for change in self.levers(self.likely))])


def question(recipe: Recipe, around: Around, where: Where, look_at_levers: bool = True) -> Question:
    """What is asked of a recipe there. Raises CommandError, CannotRun, RecipeError."""
    config = recipe.config
    requirements.check_sharded(config, where.backend.fsdp, where.backend.readers)
    check_quantized(getattr(config, "adapter", ""), where.backend)
    shape = shape_of(recipe, around)
    found = loops(recipe, shape, where.backend, reshard=where.reshard)
    long = amounts(recipe, around.runs_dir, found)
    likely = max(range(len(found)), key=lambda nth: (long[nth].tokens or 0, nth))
    return Question(recipe, where, shape, found, long, likely, look_at_levers)


def _steps(found: Sequence[Loop]) -> list[tuple[Asked, int]]:
    return [(loop.asked, loop.length) for loop in found]


def answer(asked: Question, known: Estimates) -> dict[str, Any]:
    """Everything about a recipe there, as JSON. Raises CommandError for a model that cannot be looked at."""
    recipe, where, found = asked.recipe, asked.where, asked.loops
    costs = known.costs(asked.steps)[: len(found)]  # all at once, beside each other: what is wanted below is then known
    answers = [_loop(loop, cost, where, amount) for loop, cost, amount in zip(found, costs, asked.amounts, strict=True)]
    main = _looked_at(answers)
    changes = asked.levers(main)
    changed = known.costs(_steps([change.loop for change in changes]))
    best = _best(found[main], costs[main], where)
    base = answers[main]
    said = [_lever(change, cost, base, best) for change, cost in zip(changes, changed, strict=True)]
    if changes and best.batch and best.batch != found[main].batch // found[main].pairs:
        said.append(_batch(found[main], costs[main], where, (base, best)))
    notes = dict.fromkeys([*asked.shape.notes, *(note for amount in asked.amounts for note in amount.notes), *_limits(recipe, where)])
    return {
        "recipe": str(recipe.path),
        "stage": recipe.stage,
        "hardware": where.title,
        "backend": where.kind,
        "processes": where.world,
        "card": {"name": where.machine.card.name, "bytes": round(where.card_bytes), "source": where.machine.card.memory_source},
        "price": _prices(where),
        "vocab_size": int(asked.shape.config["vocab_size"]),
        "loops": answers,
        "hours": hours(answers),
        "levers": {"of": found[main].name, "changes": sorted(said, key=_order)},
        "notes": list(notes),
    }


def _limits(recipe: Recipe, where: Where) -> Iterator[str]:
    """What of this recipe and launch the answer leaves out, or has not been verified."""
    config = recipe.config
    if config.training.torch_compile:
        yield "torch_compile is not reckoned: compiled steps hold and take less"
    if config.training.trainer_arguments:
        yield f"training.trainer_arguments are not looked at: {', '.join(config.training.trainer_arguments)}"
    if where.context > 1:
        yield "sequences split over processes are reckoned as shorter ones, without the ring's buffers: not verified"
    if where.kind.startswith("zero"):
        yield "DeepSpeed is reckoned, not run: not verified"
    if getattr(config, "method", "") == "dpo":
        yield "of the reference its weights are reckoned, and not its forward pass: a third to a half more time"


def _looked_at(answers: Sequence[dict[str, Any]]) -> int:
    """The loop whose changes are of most use: of those that fit at no batch the largest, else the one with the most tokens, as far as known."""

    def use(nth: int) -> tuple[bool, int, int]:
        loop = answers[nth]
        nowhere = loop["fitting_batch"] == 0
        return nowhere, loop["memory"]["peak"] if nowhere else loop["tokens"] or 0, nth

    return max(range(len(answers)), key=use)


def _loop(loop: Loop, cost: Cost, where: Where, amount: Amount) -> dict[str, Any]:
    needs = memory_budget.room(cost, loop.asked, loop.batch, where.world, where.replicate)
    surely, perhaps = memory_budget.largest_batch(cost, loop.asked, where.card_bytes, where.world, where.replicate)
    time = step_time.step_time(cost, loop.asked, loop.batch, loop.accumulation, where)
    rate = asdict(time.total.rate(loop.tokens(where.backend)))
    long = asdict(time.total.times(amount.steps / HOUR)) if amount.steps else None
    return {
        "name": loop.name,
        "parameters": {key: getattr(cost.parameters, key) for key in ("total", "trainable", "embeddings")},
        "max_length": loop.length * where.context,
        "per_device_train_batch_size": loop.batch // loop.pairs,
        "gradient_accumulation_steps": loop.accumulation,
        "memory": {"parts": {k: round(v) for k, v in needs.parts.items()}, "peak": round(needs.peak), "least": round(needs.least), "most": round(needs.most)},
        "verdict": needs.verdict(where.card_bytes),
        "largest_batch": {"surely": surely // loop.pairs, "perhaps": perhaps // loop.pairs},
        "fitting_batch": _best(loop, cost, where).batch,
        "flops_per_token": cost.flops(loop.batch) / (loop.batch * loop.length),
        "step_seconds": asdict(time.total),
        "seconds_by": {"compute": time.compute.middle, "links in a machine": time.inside, "network": time.between.middle},
        "bound": time.bound,
        "tokens_per_second": rate,
        "tokens_per_second_per_card": {key: value / where.world for key, value in rate.items()},
        "hours_without_efa": time.without_efa * amount.steps / HOUR if time.without_efa and amount.steps else None,
        "rests_on": time.rests_on,
        "steps": amount.steps,
        "tokens": amount.tokens,
        "epochs": amount.epochs,
        "hours": long,
        "cost": _cost(long, where),
    }  # fmt: skip


@dataclass(frozen=True)
class Best:
    """The largest batch on a device that surely fits and divides, how often it accumulates, and the rate with it; batch 0: none does."""

    batch: int
    accumulation: int
    rate: dict[str, float] | None


def _best(loop: Loop, cost: Cost, where: Where) -> Best:
    split = memory_budget.fitting(cost, loop, where.card_bytes, where.backend)
    if split is None:
        return Best(0, 0, None)
    time = step_time.step_time(cost, loop.asked, split.per_device * loop.pairs, split.accumulation, where)
    return Best(split.per_device, split.accumulation, asdict(time.total.rate(loop.tokens(where.backend))))


def _lever(change: Lever, cost: Cost, base: dict[str, Any], before: Best) -> dict[str, Any]:
    """What a change does: to memory at the batch as it is, to the largest batch, and to the rate at the batch that then is best."""
    loop, where = change.loop, change.where
    needs = memory_budget.room(cost, loop.asked, loop.batch, where.world, where.replicate)
    surely, perhaps = memory_budget.largest_batch(cost, loop.asked, where.card_bytes, where.world, where.replicate)
    best = _best(loop, cost, where)
    return {
        "change": change.what,
        "how": change.how,
        "peak": round(needs.peak),
        "difference": round(needs.peak - base["memory"]["peak"]),
        "verdict": needs.verdict(where.card_bytes),
        "largest_batch": {"surely": surely // loop.pairs, "perhaps": perhaps // loop.pairs},
        "best_batch": best.batch,
        "tokens_per_second": best.rate,
        "faster": best.rate["middle"] / before.rate["middle"] - 1 if best.rate and before.rate else None,
    }


def _batch(loop: Loop, cost: Cost, where: Where, known: tuple[dict[str, Any], Best]) -> dict[str, Any]:
    """What the best batch does, against the one that the recipe has."""
    base, best = known
    split = replace(loop, batch=best.batch * loop.pairs, asked=replace(loop.asked, accumulates=best.accumulation > 1))
    line = _lever(
        Lever(f"{best.batch} sequences at once", f"--set training.per_device_train_batch_size={best.batch}", split, where), cost, base, best
    )
    return {**line, "faster": best.rate["middle"] / base["tokens_per_second"]["middle"] - 1 if best.rate else None}


def _order(line: dict[str, Any]) -> tuple[bool, float]:
    return line["tokens_per_second"] is None, -(line["tokens_per_second"] or {"middle": 0.0})["middle"]


def _prices(where: Where) -> dict[str, Any]:
    return {
        name: None
        if price is None
        else {"usd_per_hour": price.usd_per_hour * where.nodes, "region": price.region, "as_of": price.as_of, "source": price.source}
        for name, price in (("on_demand", where.machine.price), ("spot", where.machine.spot))
    }


def _cost(long: dict[str, float] | None, where: Where) -> dict[str, dict[str, float] | None]:
    found: dict[str, dict[str, float] | None] = {}
    for name, price in _prices(where).items():
        found[name] = {key: value * price["usd_per_hour"] for key, value in long.items()} if long and price else None
    return found


def hours(answers: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Of loops, or of recipes, together; None where one of them is not known."""
    spans = [answer["hours"] for answer in answers]
    return None if any(span is None for span in spans) else {key: sum(span[key] for span in spans) for key in ("low", "middle", "high")}
