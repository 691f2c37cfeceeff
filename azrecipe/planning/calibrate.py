"""Calibrating step times with the measured rate of a run."""

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
from azrecipe.planning.efficiency import classify_step, estimate_efficiency
from azrecipe.planning.model_config import ModelShape, read_saved_model_shape
from azrecipe.planning.simulation import cost_cache
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.step_time import MachineGroup
from azrecipe.planning.training_loops import PlannedLoop, plan_config_loops
from azrecipe.recipe.load import load_run_config
from azrecipe.recipe.types import PretrainConfig, SftConfig
from azrecipe.runs import event_log
from azrecipe.runs.reader import RunRecord

MIN_LOGGED_LINES = 5  # with fewer logged lines, one slow moment decides the median


@dataclass(frozen=True)
class LoggedRate:
    """The rate between two logged lines.

    step_seconds: seconds of one step. tokens_per_second: of all processes together.
    """

    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class CalibrationRun:
    """A run to calibrate from: its recipe, device, machines and model."""

    config: PretrainConfig | SftConfig
    device: str
    cluster: MachineGroup
    model: ModelShape


def calibrate_from_run(run_dir: Path) -> str:
    """Measure a run's share of the roofline and save it.

    Returns a report for the user. Raises CommandError for a run that does not show a card's speed: on a CPU, too short, on an unknown
    card, or limited by its links.
    """
    run = _load_run(run_dir)
    report, usable = [], []
    for loop in plan_config_loops(run.config, run.model, run.cluster.backend, card=run.cluster.machine.card):
        rates = list(_steady_rates(run_dir, loop.name, run.config.training))
        if len(rates) < MIN_LOGGED_LINES:
            report.append(f"  {loop.name}: left out, too short: {_explain_too_short(rates, run.config.training)}")
        else:
            usable.append((loop, rates))
    costs = cost_cache.load_or_simulate_costs([(loop.step, loop.length) for loop, _ in usable])
    entries, kinds = [], []
    for (loop, rates), cost in zip(usable, costs, strict=True):
        entry = _measure_loop(run.cluster, loop, cost, rates)
        if isinstance(entry, str):
            report.append(f"  {loop.name}: left out: {entry}")
        else:
            entries.append(entry)
            kinds.append(classify_step(loop.step))
            rate = entry["tokens_per_second"] / run.cluster.world_size
            report.append(
                f"  {loop.name}: {entry['efficiency']:.3f} of the roofline ({rate:,.0f} tokens/s a card, median of {len(rates)} logged lines)"
            )
    head = f"{run_dir}: {run.cluster.machine.name}, {run.cluster.strategy}"
    if not entries:
        raise CommandError("\n".join([f"{head}: nothing to learn from", *report]))
    record = RunRecord(run_dir, str(run_dir))
    card, run_id, versions = run.cluster.machine.card.name, record.status.get("run_id"), record.environment.get("versions", {})
    calibration_file.add_calibrated_run(
        {"run_id": run_id or str(run_dir.resolve()), "run": str(run_dir.resolve()), "calibrated": event_log.format_current_time(), "card": card, "device": run.device,
         "hardware": run.cluster.machine.name, "backend": run.cluster.strategy, "versions": versions, "loops": entries}
    )  # fmt: skip
    efficiency = estimate_efficiency(run.cluster.machine.card, kinds[0], calibration_file.read_efficiencies())
    span = efficiency.share
    effect = f"azrecipe plan estimates {card} with {span.middle:.3f} ({span.low:.3f}–{span.high:.3f}) from now on: {efficiency.basis}"
    return "\n".join([head, *report, f"kept in {calibration_file.get_calibration_path()}", effect])


def _measure_loop(cluster: MachineGroup, loop: PlannedLoop, cost: StepCost, rates: Sequence[LoggedRate]) -> dict[str, Any] | str:
    """Measure a loop's share of the roofline.

    Returns the reason, as text, where the share does not show the card's speed.
    """
    time = step_time.estimate_step_time(cost, loop.step, loop.batch, loop.accumulation, cluster)
    if time.bottleneck != "compute":
        bottleneck = "the links between the cards" if time.bottleneck == "links" else "the network"
        return f"it waits for {bottleneck}, not for the cards. A run with more sequences at once, or on one card, tells"
    seconds = statistics.median(rate.step_seconds for rate in rates)
    share = step_time.compute_roofline(cost, loop.step, loop.batch, loop.accumulation, cluster) / seconds
    if share > 1:
        return (
            f"a step took {seconds:.3g} s, {1 / share:.0%} of what the card's peaks allow: "
            "its model is too small, or the card is not what it is taken for"
        )
    tokens_per_second = statistics.median(rate.tokens_per_second for rate in rates)
    return {
        "name": loop.name,
        "efficiency": round(share, 4),
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
        "lines": len(rates),
    }


def _load_run(path: Path) -> CalibrationRun:
    """Read a run directory.

    Raises CommandError where something is missing, or the run cannot be calibrated from.
    """
    if not (path / "recipe.yaml").is_file():
        raise CommandError(f"{path}: no run: there is no {path / 'recipe.yaml'}")
    config, environment = load_run_config(path / "recipe.yaml"), RunRecord(path, str(path)).environment
    if not isinstance(config, PretrainConfig | SftConfig):
        raise CommandError(f"{path}: a run of pretrain or sft is needed; this one trains no model")
    if isinstance(config, SftConfig) and not (config.method == "sft" and config.data.packing):
        raise CommandError(
            f"{path}: rows of conversations differ in length, so the work of a step is not known: a pretrain run, or sft with data.packing"
        )
    if isinstance(config, PretrainConfig) and not config.data.packing:
        raise CommandError(f"{path}: sequences differ in length, so the work of a step is not known: a run with data.packing")
    cluster = _read_machines(path, environment)
    return CalibrationRun(config, environment["gpus"][0], cluster, _load_model_shape(path))


def _read_machines(path: Path, environment: Mapping[str, Any]) -> MachineGroup:
    """Read a run's cards and its strategy from environment.json."""
    gpus = environment.get("gpus") or []
    if not gpus:
        raise CommandError(f"{path}: it ran on a CPU (its environment.json names no GPU): only a run on a GPU tells how fast a card is")
    backend, memory = environment.get("backend"), environment.get("gpu_memory_bytes")
    if not backend or not memory:
        raise CommandError(f"{path}: its environment.json does not say how the processes shared the work: an earlier azrecipe wrote it")
    if len(set(gpus)) > 1:
        raise CommandError(
            f"{path}: it ran on cards of several kinds ({', '.join(sorted(set(gpus)))}), and the slowest would count for all"
        )
    if environment.get("nodes", 1) > 1:
        raise CommandError(
            f"{path}: it ran on {environment['nodes']} machines, whose network is not known and may have slowed it down: a run on one"
        )
    machine: Machine | None = hardware.build_machine_of_device(gpus[0], int(environment["world_size"]), int(memory[0]))
    if machine is None:
        raise CommandError(f"{path}: {gpus[0]} is no card that is known here. Known: {', '.join(hardware.load_catalog().cards)}")
    return MachineGroup(machine, 1, backend["kind"], backend["replicate"], backend["context"])


def _load_model_shape(path: Path) -> ModelShape:
    """Read the trained model's shape from plan.json, or from the saved model."""
    planned = RunRecord(path, str(path)).plan.get("model")
    if planned:
        return ModelShape(planned["config"], planned["new_tokens"], ())
    if not (path / "final" / "config.json").is_file():
        raise CommandError(f"{path}: the model's shapes are not there: neither plan.json nor final/, which a complete run has")
    return read_saved_model_shape(path / "final")


def _steady_rates(path: Path, loop: str, training: Any) -> Iterator[LoggedRate]:
    """List a loop's rates between logged lines since its last start.

    Left out are intervals with a checkpoint or an evaluation.
    """
    first_step = _find_first_step(path, loop)
    lines = [line for line in RunRecord(path, str(path)).metrics if line.get("phase") == loop]
    logged = [
        line for line in lines if line.get("tokens_per_second") and "loss" in line and first_step is not None and line["step"] > first_step
    ]
    evaluations = {line["step"] for line in lines if "loss" not in line}
    for previous, line in pairwise(logged):
        steps, tokens = line["step"] - previous["step"], line["tokens"] - previous["tokens"]
        next_checkpoint = -(-previous["step"] // training.save_steps) * training.save_steps
        interrupted = next_checkpoint < line["step"] or any(previous["step"] <= step < line["step"] for step in evaluations)
        if steps > 0 and tokens > 0 and not interrupted:
            yield LoggedRate(tokens / line["tokens_per_second"] / steps, float(line["tokens_per_second"]))


def _find_first_step(path: Path, loop: str) -> int | None:
    """Find the step at which the run's last start began a loop.

    Returns 0 without an event log, None where the last start did not reach the loop. Lines of an earlier start may be another machine's.
    """
    events = RunRecord(path, str(path)).history
    last_start = max((index for index, event in enumerate(events) if event.get("event") == "started"), default=None)
    if last_start is None:
        return 0
    loop_starts = (event for event in events[last_start:] if event.get("event") == "training" and event.get("phase") == loop)
    return next((int(event.get("step") or 0) for event in loop_starts), None)


def _explain_too_short(rates: Sequence[LoggedRate], training: Any) -> str:
    logging_steps, save_steps, eval_steps = training.logging_steps, training.save_steps, training.eval_steps
    steps = (MIN_LOGGED_LINES + 1) * logging_steps
    shortest = min(save_steps, eval_steps or save_steps)
    evaluation = f", eval_steps {eval_steps}" if eval_steps else ""
    more = f" (save_steps is {save_steps}{evaluation})" if shortest < steps else ""
    return (
        f"{MIN_LOGGED_LINES} logged lines after the first are needed into which no checkpoint and no evaluation fell, and it has {len(rates)}: "
        f"{steps} steps at least, as logging_steps is {logging_steps}{more}"
    )
