"""Knows how to learn from a run directory how near to its card's roofline that run came."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from azrecipe import hardware
from azrecipe.errors import CommandError
from azrecipe.hardware import Machine
from azrecipe.planning import calibration_file, step_time
from azrecipe.planning.model_config import ModelShape, of_folder
from azrecipe.planning.simulation import cost_cache
from azrecipe.planning.simulation.step_cost import Cost
from azrecipe.planning.step_time import Cluster
from azrecipe.planning.training_loops import Loop, loops_of
from azrecipe.recipe.load import of_run
from azrecipe.recipe.types import Pretrain, Sft
from azrecipe.runs import event_log
from azrecipe.utils.atomic_files import read_json

STEADY = 5  # logged lines that a rate rests on: fewer and one slow moment decides


@dataclass(frozen=True)
class Line:
    """Some steps of a loop: seconds of one, and tokens/s of all processes together."""

    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Ran:
    """What a run was: its recipe, the cards and how processes shared the work, and its model."""

    config: Pretrain | Sft
    device: str
    cluster: Cluster
    model: ModelShape


def learn(path: Path) -> str:
    """Reckon a run's share of the roofline, keep it in the user's own file, and say it.

    Raises CommandError for a run that says nothing of a card: on a CPU, too short, an unknown card, bound by its links.
    """
    ran = _ran(path)
    said, usable = [], []
    for loop in loops_of(ran.config, ran.model, ran.cluster.backend):
        lines = list(_steady(path, loop.name, ran.config.training))
        if len(lines) < STEADY:
            said.append(f"  {loop.name}: left out, too short: {_needed(lines, ran.config.training)}")
        else:
            usable.append((loop, lines))
    costs = cost_cache.costs([(loop.asked, loop.length) for loop, _ in usable])
    found = []
    for (loop, lines), cost in zip(usable, costs, strict=True):
        told, reason = _reckoned(ran.cluster, loop, cost, lines)
        if told is None:
            said.append(f"  {loop.name}: left out: {reason}")
        else:
            found.append(told)
            rate = told["tokens_per_second"] / ran.cluster.world
            said.append(
                f"  {loop.name}: {told['efficiency']:.3f} of the roofline ({rate:,.0f} tokens/s a card, median of {len(lines)} logged lines)"
            )
    head = f"{path}: {ran.cluster.machine.name}, {ran.cluster.kind}"
    if not found:
        raise CommandError("\n".join([f"{head}: nothing to learn from", *said]))
    card, run_id = ran.cluster.machine.card.name, (read_json(path / "status.json") or {}).get("run_id")
    versions = (read_json(path / "environment.json") or {}).get("versions", {})
    calibration_file.keep(
        {"run_id": run_id or str(path.resolve()), "run": str(path.resolve()), "calibrated": event_log.now(), "card": card, "device": ran.device,
         "hardware": ran.cluster.machine.name, "backend": ran.cluster.kind, "versions": versions, "loops": found}
    )  # fmt: skip
    span, rests_on = step_time.efficiency(card, calibration_file.efficiencies())
    now = f"azrecipe plan reckons {card} with {span.middle:.3f} ({span.low:.3f}–{span.high:.3f}) from now on: {rests_on}"
    return "\n".join([head, *said, f"kept in {calibration_file.file()}", now])


def _reckoned(cluster: Cluster, loop: Loop, cost: Cost, lines: Sequence[Line]) -> tuple[dict[str, Any] | None, str]:
    """The share of the roofline that a loop reached; or None, and why it says nothing of the card."""
    time = step_time.step_time(cost, loop.asked, loop.batch, loop.accumulation, cluster)
    if time.bound != "compute":
        where = "the links between the cards" if time.bound == "links" else "the network"
        return None, f"it waits for {where}, not for the cards. A run with more sequences at once, or on one card, tells"
    seconds = statistics.median(line.step_seconds for line in lines)
    share = step_time.roofline(cost, loop.asked, loop.batch, loop.accumulation, cluster) / seconds
    if share > 1:
        return (
            None,
            f"a step took {seconds:.3g} s, {1 / share:.0%} of what the card's peaks allow: its model is too small, or the card is not what it is taken for",
        )
    rate = statistics.median(line.tokens_per_second for line in lines)
    return {"name": loop.name, "efficiency": round(share, 4), "tokens_per_second": rate, "step_seconds": seconds, "lines": len(lines)}, ""


def _ran(path: Path) -> Ran:
    """What stands in the run directory. Raises CommandError where it lacks what is needed, or is a run that cannot tell."""
    if not (path / "recipe.yaml").is_file():
        raise CommandError(f"{path}: no run: there is no {path / 'recipe.yaml'}")
    config, found = of_run(path / "recipe.yaml"), read_json(path / "environment.json") or {}
    if not isinstance(config, Pretrain | Sft):
        raise CommandError(f"{path}: a run of pretrain or sft is needed; this one trains no model")
    if isinstance(config, Sft) and not (config.method == "sft" and config.data.packing):
        raise CommandError(
            f"{path}: rows of conversations differ in length, so the work of a step is not known: a pretrain run, or sft with data.packing"
        )
    if isinstance(config, Pretrain) and not config.data.packing:
        raise CommandError(f"{path}: sequences differ in length, so the work of a step is not known: a run with data.packing")
    if config.training.torch_compile:
        raise CommandError(f"{path}: torch_compile fuses operators, which the estimate counts one by one: a run without it")
    return Ran(config, *_where(path, found), _model(path))


def _where(path: Path, found: Mapping[str, Any]) -> tuple[str, Cluster]:
    """The cards of a run, as its environment.json has them."""
    gpus = found.get("gpus") or []
    if not gpus:
        raise CommandError(f"{path}: it ran on a CPU (its environment.json names no GPU): only a run on a GPU tells how fast a card is")
    backend, memory = found.get("backend"), found.get("gpu_memory_bytes")
    if not backend or not memory:
        raise CommandError(
            f"{path}: its environment.json does not say how the processes shared the work: it was made by an earlier azrecipe"
        )
    if len(set(gpus)) > 1:
        raise CommandError(
            f"{path}: it ran on cards of several kinds ({', '.join(sorted(set(gpus)))}), and the slowest would count for all"
        )
    if found.get("nodes", 1) > 1:
        raise CommandError(
            f"{path}: it ran on {found['nodes']} machines, whose network is not known and may have been what it waited for: a run on one"
        )
    machine: Machine | None = hardware.of_device(gpus[0], int(found["world_size"]), int(memory[0]))
    if machine is None:
        raise CommandError(f"{path}: {gpus[0]} is no card that is known here. Known: {', '.join(hardware.load().cards)}")
    return gpus[0], Cluster(machine, 1, backend["kind"], backend["replicate"], backend["context"])


def _model(path: Path) -> ModelShape:
    """The model as it trained: as it was foreseen, or as it was saved."""
    foreseen = (read_json(path / "plan.json") or {}).get("model")
    if foreseen:
        return ModelShape(foreseen["config"], foreseen["new_tokens"], ())
    if not (path / "final" / "config.json").is_file():
        raise CommandError(f"{path}: the model's shapes are not there: neither plan.json nor final/, which a complete run has")
    return of_folder(path / "final")


def _steady(path: Path, loop: str, training: Any) -> Iterator[Line]:
    """The logged lines of a loop since its last start, but the first of them, and those that a checkpoint or an evaluation fell into."""
    begun = _begun(path, loop)
    every = [line for line in event_log.lines(path / "metrics.jsonl") if line.get("phase") == loop]
    logged = [line for line in every if line.get("tokens_per_second") and "loss" in line and begun is not None and line["step"] > begun]
    stops = {line["step"] for line in every if "loss" not in line}
    for before, line in pairwise(logged):
        steps, tokens = line["step"] - before["step"], line["tokens"] - before["tokens"]
        saved = -(-before["step"] // training.save_steps) * training.save_steps < line["step"]  # the next one from the line before on
        if steps > 0 and tokens > 0 and not saved and not any(before["step"] <= stop < line["step"] for stop in stops):
            yield Line(tokens / line["tokens_per_second"] / steps, float(line["tokens_per_second"]))


def _begun(path: Path, loop: str) -> int | None:
    """The step that the last start of a run began a loop at; 0 where there is no log, None where that start did not come to it.

    Lines of an earlier start may be another machine's.
    """
    told = event_log.read(path)
    last = max((nth for nth, line in enumerate(told) if line.get("event") == "started"), default=None)
    if last is None:
        return 0
    return next((int(line.get("step") or 0) for line in told[last:] if line.get("event") == "training" and line.get("phase") == loop), None)


def _needed(lines: Sequence[Line], training: Any) -> str:
    every, save, measured = training.logging_steps, training.save_steps, training.eval_steps
    steps = (STEADY + 1) * every
    more = f" (save_steps is {save}{f', eval_steps {measured}' if measured else ''})" if min(save, measured or save) < steps else ""
    return (
        f"{STEADY} logged lines after the first are needed into which no checkpoint and no evaluation fell, and it has {len(lines)}: "
        f"{steps} steps at least, as logging_steps is {every}{more}"
    )
