"""The estimate of a run on its cards, before weights are loaded.

Memory, rate, and a change that makes the run fit. The step is simulated in a process without GPUs. No failure of that stops a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any, NamedTuple

from azrecipe import hardware
from azrecipe.distributed.backend import Backend, count_nodes, has_accelerator
from azrecipe.errors import AzrecipeError, CannotRun, Interrupted, explain_error, get_first_line
from azrecipe.hardware import Card, Machine
from azrecipe.modeling import liger_kernels
from azrecipe.planning import memory_budget, step_time, training_loops
from azrecipe.planning.evaluation_memory import compute_evaluation_budget, find_fitting_eval_batch, get_verdict
from azrecipe.planning.model_config import NON_SHAPE_KEYS, ModelShape
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.simulation_process import BackgroundSimulation, EstimateUnavailable, simulate_in_subprocess
from azrecipe.planning.training_loops import PlannedLoop
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import SftConfig
from azrecipe.runs import event_log
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils import environment_variables
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.console import format_bytes, print_progress

PLAN_FILE = "plan.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class LocalDevices:
    """The cards of a run.

    device: PyTorch's name of a card. memory_bytes: of one card. machine: the catalog's entry, if there is one. nodes: machines.
    """

    device: str
    memory_bytes: int
    machine: Machine | None
    nodes: int

    @property
    def card(self) -> Card | None:
        return self.machine.card if self.machine else None


def build_model_shape(config: Any, rows: int, new_tokens: int = 0) -> ModelShape:
    """Build the shapes of a run's model.

    config: transformers' configuration as it was loaded. rows: the rows that its embeddings will have.
    """
    values = json.loads(config.get_text_config().to_json_string(use_diff=False))
    return ModelShape({key: value for key, value in values.items() if key not in NON_SHAPE_KEYS} | {"vocab_size": rows}, new_tokens, ())


def begin_simulation(recipe: Recipe, model: ModelShape, backend: Backend) -> BackgroundSimulation | None:
    """Begin to simulate a run's steps, while the run reads its text.

    Only the main process does it. None where there will be no estimate.

    Args:
        recipe: A pretrain or sft recipe.
        model: The shapes of its model.
        backend: The processes.
    """
    switch = environment_variables.ESTIMATE.read()
    if not backend.main or switch == "0":
        return None
    with contextlib.suppress(Exception):  # as in estimate_run, which says why
        devices = _find_local_devices(backend)
        if devices is not None or switch == "1":
            planned = _plan_loops(recipe, model, backend, cuda=devices is not None, card=devices.card if devices else None)
            return BackgroundSimulation([(loop.step, loop.length) for loop in planned])
    return None


def estimate_run(
    recipe: Recipe, model: ModelShape, run_dir: RunDir, backend: Backend, simulation: BackgroundSimulation | None = None
) -> None:
    """Estimate a run before its weights are loaded, and write plan.json.

    Prints what each loop will need, and a warning for one that will not fit. Only the main process does it, and of several processes none
    waits for it. It never raises.

    Args:
        recipe: A pretrain or sft recipe.
        model: The shapes of its model.
        run_dir: Where plan.json is written.
        backend: The processes.
        simulation: What begin_simulation returned.
    """
    switch = environment_variables.ESTIMATE.read()
    if not backend.main:
        return
    with contextlib.suppress(OSError):
        (run_dir.path / PLAN_FILE).unlink(missing_ok=True)  # of an earlier start, on another machine or with another batch
    try:
        devices = _find_local_devices(backend)
        if switch == "0" or (devices is None and switch != "1"):
            return
    except Exception as error:
        print_progress(f"  no estimate of memory and rate: {get_first_line(error)}")
        return

    def write_estimate() -> None:
        try:
            start = time.monotonic()
            plan = build_estimate(recipe, model, backend, devices, simulation)
            write_json(run_dir.path / PLAN_FILE, {**plan, "seconds": round(time.monotonic() - start, 1)})
            for line in format_lines(plan):
                print_progress(line)
        except Interrupted:
            raise
        except Exception as error:  # whatever goes wrong with an estimate, the run goes on
            print_progress(f"  no estimate of memory and rate: {get_first_line(error)}")

    if backend.world_size == 1:
        write_estimate()
    else:
        threading.Thread(target=write_estimate, name="estimate", daemon=True).start()


def _find_local_devices(backend: Backend) -> LocalDevices | None:
    """Find the cards that this run is on; None without any."""
    import torch

    if not (torch.cuda.is_available() and has_accelerator()):
        return None
    properties, nodes = torch.cuda.get_device_properties(0), count_nodes(os.environ)
    count = max(backend.world_size // nodes, 1)
    machine = hardware.build_machine_of_device(properties.name, count, properties.total_memory)
    return LocalDevices(properties.name, properties.total_memory, machine, nodes)


def build_estimate(
    recipe: Recipe, model: ModelShape, backend: Backend, devices: LocalDevices | None, simulation: BackgroundSimulation | None = None
) -> dict[str, Any]:
    """Build the content of plan.json.

    Args:
        recipe: A pretrain or sft recipe.
        model: The shapes of its model.
        backend: The processes.
        devices: The cards. None on a CPU: then only the bytes of tensors are estimated.
        simulation: What begin_simulation returned.

    Raises:
        EstimateUnavailable: The simulation failed or took too long.
        CommandError: The global batch does not divide over the processes.
    """
    planned = _plan_loops(recipe, model, backend, cuda=devices is not None, card=devices.card if devices else None)
    costs = simulation.wait() if simulation else simulate_in_subprocess([(loop.step, loop.length) for loop in planned])
    machine = devices.machine if devices else None
    loops = [_estimate_loop(loop, cost, backend, devices) for loop, cost in zip(planned, costs, strict=True)]
    for index, loop in enumerate(loops):
        if devices is not None and loop["verdict"] != "fits":
            loop["change"] = find_fitting_change(recipe, model, backend, devices, loop_index=index, cost=costs[index])
    return {
        "device": devices.device if devices else "cpu",
        "card": {"name": machine.card.name if machine else None, "bytes": devices.memory_bytes} if devices else None,
        "processes": backend.world_size,
        "nodes": devices.nodes if devices else count_nodes(os.environ),
        "backend": backend.strategy,
        "model": {"config": dict(model.config), "new_tokens": model.new_tokens},
        "versions": {name: version(name) for name in PACKAGES},
        "loops": loops,
    }


def _plan_loops(recipe: Recipe, model: ModelShape, backend: Backend, cuda: bool = True, card: Card | None = None) -> list[PlannedLoop]:
    """Plan the loops with the launcher's fsdp_reshard_after_forward."""
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    return training_loops.plan_loops(recipe, model, backend, cuda, reshard, card=card)


def _estimate_loop(loop: PlannedLoop, cost: StepCost, backend: Backend, devices: LocalDevices | None) -> dict[str, Any]:
    budget = memory_budget.compute_memory_budget(cost, loop.step, loop.batch, backend.world_size, backend.replicate_size)
    memory = {"parts": {name: round(value) for name, value in budget.parts.items()}, "peak": round(budget.peak)}
    measuring = compute_evaluation_budget(cost, loop, backend.world_size, backend.context_parallel_size)
    if measuring is not None:
        memory["measuring"] = round(measuring.peak)
    rate: dict[str, Any] = {"tokens_per_second": None, "rests_on": None}
    if devices is not None:
        memory |= {"least": round(budget.lower_bound), "most": round(budget.upper_bound)}
    if devices is not None and devices.machine is not None:
        cluster = step_time.MachineGroup(
            devices.machine, devices.nodes, backend.strategy, backend.replicate_size, backend.context_parallel_size
        )
        step_seconds = step_time.estimate_step_time(cost, loop.step, loop.batch, loop.accumulation, cluster)
        rate = {
            "tokens_per_second": asdict(step_seconds.total.to_rate(loop.count_tokens(backend))),
            "rests_on": step_seconds.basis + (", the network between machines not counted" if devices.nodes > 1 else ""),
        }
    return {
        "name": loop.name,
        "parameters": {key: getattr(cost.parameters, key) for key in ("total", "trainable", "embeddings")},
        "max_length": loop.length * backend.context_parallel_size,
        "per_device_train_batch_size": loop.batch // loop.pairs,
        "gradient_accumulation_steps": loop.accumulation,
        "memory": memory,
        "verdict": get_verdict(budget, measuring, devices.memory_bytes) if devices else None,
        "change": None,
        **rate,
    }


class _Change(NamedTuple):
    """A change: command-line options, and the resulting recipe and backend."""

    options: str
    recipe: Recipe
    backend: Backend


def find_fitting_change(
    recipe: Recipe, model: ModelShape, backend: Backend, devices: LocalDevices, *, loop_index: int, cost: StepCost
) -> str | None:
    """Find the smallest change with which a loop certainly fits.

    First fewer sequences at once, which changes no result; then Liger's kernels, activation checkpointing, both, and FSDP.

    Args:
        recipe: A pretrain or sft recipe.
        model: The shapes of its model.
        backend: The processes.
        devices: The cards.
        loop_index: Which loop.
        cost: The loop's simulated step.

    Returns:
        The command-line options, or None where no change is enough.
    """
    loop = _plan_loops(recipe, model, backend, card=devices.card)[loop_index]
    if (options := _list_batch_options(loop, cost, backend, devices)) is not None:
        return " ".join(options)
    changes = list(_list_changes(recipe, model, backend))
    changed_loops = [_plan_loops(change.recipe, model, change.backend, card=devices.card)[loop_index] for change in changes]
    try:
        costs = simulate_in_subprocess([(changed.step, changed.length) for changed in changed_loops])
    except EstimateUnavailable:
        return None
    for change, changed, changed_cost in zip(changes, changed_loops, costs, strict=True):
        if (options := _list_batch_options(changed, changed_cost, change.backend, devices)) is not None:
            return " ".join([change.options, *options])
    return None


def _list_batch_options(loop: PlannedLoop, cost: StepCost, backend: Backend, devices: LocalDevices) -> list[str] | None:
    """List the options with which a loop certainly fits.

    None where no batch does. The training batch divides the global batch. No batch is larger than the recipe's.
    """
    split = memory_budget.find_largest_fitting_batch(cost, loop, devices.memory_bytes, backend)
    eval_batch = find_fitting_eval_batch(cost, loop, devices.memory_bytes, backend.world_size, backend.context_parallel_size)
    if split is None or eval_batch == 0:
        return None
    options = []
    if split.per_device < loop.batch // loop.pairs:
        options.append(f"--set training.per_device_train_batch_size={split.per_device}")
    if eval_batch is not None and eval_batch < loop.eval_batch:
        options.append(f"--set training.per_device_eval_batch_size={eval_batch}")
    return options


def _list_changes(recipe: Recipe, model: ModelShape, backend: Backend) -> Iterator[_Change]:
    """List changes that save memory and leave the result as it is."""
    training = recipe.config.training
    candidates: list[dict[str, Any]] = []
    kernels, checkpointing = {"use_liger_kernel": True}, {"activation_checkpointing": True}
    if not training.use_liger_kernel and _supports_liger(recipe, model):
        candidates.append(kernels)
    if training.checkpoint_every != 1:
        candidates.append(checkpointing)
    if len(candidates) == 2:
        candidates.append(kernels | checkpointing)
    for settings in candidates:
        yield _Change(_format_options(settings), _set_training(recipe, settings), backend)
    if backend.strategy == "ddp" and not (isinstance(recipe.config, SftConfig) and recipe.config.adapter == "qlora"):
        fsdp, options = Backend("fsdp2", backend.world_size, backend.rank), "--accelerate-config fsdp"
        yield _Change(options, recipe, fsdp)
        for settings in candidates[-1:]:
            yield _Change(f"{options} {_format_options(settings)}", _set_training(recipe, settings), fsdp)


def _format_options(settings: dict[str, Any]) -> str:
    return " ".join(f"--set training.{key}=true" for key in settings)


def _set_training(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    return replace(recipe, config=replace(recipe.config, training=replace(recipe.config.training, **settings)))


def _supports_liger(recipe: Recipe, model: ModelShape) -> bool:
    try:
        liger_kernels.check_liger_kernels(_set_training(recipe, {"use_liger_kernel": True}), str(model.config["model_type"]))
    except AzrecipeError:
        return False
    return True


def format_lines(plan: dict[str, Any]) -> list[str]:
    """Format plan.json as lines of progress."""
    lines = []
    for loop in plan["loops"]:
        memory, rate = loop["memory"], loop["tokens_per_second"]
        parts = [f"{format_bytes(memory['peak'])} of tensors at the peak"]
        if plan["card"]:
            name = plan["card"]["name"] or plan["device"]
            bounds = f"{format_bytes(memory['least'])}–{format_bytes(memory['most'])}"
            parts.append(f"{bounds} with the memory around them, of {format_bytes(plan['card']['bytes'])} ({name})")
        if rate:
            parts.append(f"{rate['low']:,.0f}–{rate['high']:,.0f} tokens/s")
        elif plan["card"]:
            parts.append("no rate: this card is not known")
        if memory.get("measuring", 0) > memory["peak"]:
            parts.append(f"{format_bytes(memory['measuring'])} of tensors while held-out text is measured")
        lines.append(f"  estimate, {loop['name']}: {', '.join(parts)}")
        if loop["verdict"] in ("may fit", "does not fit"):
            verdict = "does not fit" if loop["verdict"] == "does not fit" else "may not fit"
            lines.append(f"  warning: {loop['name']} {verdict} on this card. {_format_advice(loop['change'])}")
    return lines


def _format_advice(change: str | None) -> str:
    if change:
        return f"What fits: {change}"
    return "No single change that keeps the result makes it fit: more cards, larger ones, or a smaller data.max_length"


@contextlib.contextmanager
def explain_out_of_memory(run_dir: RunDir) -> Iterator[None]:
    """Add the loop's estimate to a GPU's out-of-memory error."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        explanation, estimate = explain_error(error), _describe_last_loop(run_dir)
        raise (CannotRun(f"{explanation}\n  {estimate}") if estimate else explanation or error) from error


def _describe_last_loop(run_dir: RunDir) -> str:
    """Describe the estimate of the loop that began last, or return ""."""
    try:
        plan, events = read_json(run_dir.path / PLAN_FILE), event_log.read_events(run_dir.path)
    except (OSError, ValueError):
        return ""
    last = events[-1] if events else {}
    loop = next((loop for loop in (plan or {}).get("loops", []) if loop["name"] == last.get("phase")), None)
    if loop is None or not plan["card"] or last.get("event") != "training":
        return ""
    memory, batch = loop["memory"], loop["per_device_train_batch_size"]
    bounds = f"{format_bytes(memory['least'])}–{format_bytes(memory['most'])} of {format_bytes(plan['card']['bytes'])}"
    estimate = f"Estimate for {loop['name']}: {bounds} ({loop['verdict']})"
    if loop["verdict"] != "fits":
        return f"{estimate}. {_format_advice(loop['change'])}"
    smaller_batch = f", or --set training.per_device_train_batch_size={batch // 2}" if batch > 1 else ""
    return f"{estimate}: the estimate was too low, or another process has memory of this card (nvidia-smi tells){smaller_batch}"
