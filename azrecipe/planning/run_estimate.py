"""Knows what a run will need before its weights are loaded: memory against the cards that it has, its rate, and what would make it fit.

The step is looked at in a process of its own that sees no GPU. No failure of that stops a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from azrecipe import hardware
from azrecipe.distributed.backend import Backend, has_accelerator, nodes
from azrecipe.errors import AzrecipeError, CannotRun, Interrupted, explain
from azrecipe.hardware import Machine
from azrecipe.modeling import liger_kernels
from azrecipe.planning import memory_budget, step_time, training_loops
from azrecipe.planning.model_config import NO_SHAPE, ModelShape
from azrecipe.planning.simulation import cost_cache
from azrecipe.planning.simulation.step_cost import Cost, from_plain
from azrecipe.planning.simulation.step_spec import Asked
from azrecipe.planning.training_loops import Loop
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Lora
from azrecipe.runs import event_log
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils.atomic_files import read_json, write_json

FILE = "plan.json"
SWITCH = "AZRECIPE_FORESEE"  # 0: never; 1: on a CPU too
LIMIT = "AZRECIPE_FORESEE_SECONDS"
SECONDS = 30.0  # that the others wait at most; it takes a few where there are cores, and none a second time
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
PACKAGES = ("torch", "transformers", "peft", "accelerate")

Steps = Sequence[tuple[Asked, int]]


@dataclass(frozen=True)
class Here:
    """The cards of a run. device: as PyTorch names one; bytes: of one; machine: what is known of such cards; nodes: machines."""

    device: str
    bytes: int
    machine: Machine | None
    nodes: int


class NotForeseen(Exception):
    """Why there is no estimate."""


def shape(config: Any, rows: int, new_tokens: int = 0) -> ModelShape:
    """The model of a run: transformers' configuration as it was loaded, and the rows that its embeddings will have."""
    known = json.loads(config.get_text_config().to_json_string(use_diff=False))
    return ModelShape({key: value for key, value in known.items() if key not in NO_SHAPE} | {"vocab_size": rows}, new_tokens, ())


def foresee(recipe: Recipe, model: ModelShape, place: RunDir, backend: Backend) -> None:
    """Say what each loop will need, warn of one that will not fit, and leave it in plan.json. The main process alone; never fails."""
    wish = os.environ.get(SWITCH, "")
    if not backend.main:
        return
    with contextlib.suppress(OSError):
        (place.path / FILE).unlink(missing_ok=True)  # of an earlier start, on another machine or with another batch
    try:
        here = _here(backend)
        if wish == "0" or (here is None and wish != "1"):
            return
        began = time.monotonic()
        found = foretell(recipe, model, backend, here)
        write_json(place.path / FILE, {**found, "seconds": round(time.monotonic() - began, 1)})
        for line in told(found):
            _say(line)
    except Interrupted:
        raise
    except Exception as error:  # an estimate is no reason to lose a run, whatever is wrong with it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _say(f"  memory and rate are not foreseen: {reason}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _here(backend: Backend) -> Here | None:
    """The cards that this run is on; None without any."""
    import torch

    if not (torch.cuda.is_available() and has_accelerator()):
        return None
    properties, machines = torch.cuda.get_device_properties(0), nodes(os.environ)
    count = max(backend.world // machines, 1)
    return Here(properties.name, properties.total_memory, hardware.of_device(properties.name, count, properties.total_memory), machines)


def foretell(recipe: Recipe, model: ModelShape, backend: Backend, here: Here | None) -> dict[str, Any]:
    """What is written to plan.json. `here`: None on a CPU, where nothing but the bytes of tensors is foreseen.

    Raises NotForeseen, CommandError.
    """
    loops = _loops(recipe, model, backend, here is not None)
    costs = apart([(loop.asked, loop.length) for loop in loops])
    machine = here.machine if here else None
    found = [_loop(loop, cost, backend, here) for loop, cost in zip(loops, costs, strict=True)]
    for nth, loop in enumerate(found):
        if here is not None and loop["verdict"] != "fits":
            loop["change"] = change(recipe, model, (backend, here), nth, costs[nth])
    return {
        "device": here.device if here else "cpu",
        "card": {"name": machine.card.name if machine else None, "bytes": here.bytes} if here else None,
        "processes": backend.world,
        "nodes": here.nodes if here else nodes(os.environ),
        "backend": backend.kind,
        "model": {"config": dict(model.config), "new_tokens": model.new_tokens},
        "versions": {name: version(name) for name in PACKAGES},
        "loops": found,
    }


def _loops(recipe: Recipe, model: ModelShape, backend: Backend, cuda: bool = True) -> list[Loop]:
    """The loops as the launcher wants them: it may have said that parameters stay whole between forward and backward."""
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    return training_loops.loops(recipe, model, backend, cuda, reshard)


def _loop(loop: Loop, cost: Cost, backend: Backend, here: Here | None) -> dict[str, Any]:
    needs = memory_budget.room(cost, loop.asked, loop.batch, backend.world, backend.replicate)
    memory = {"parts": {name: round(value) for name, value in needs.parts.items()}, "peak": round(needs.peak)}
    rate: dict[str, Any] = {"tokens_per_second": None, "rests_on": None}
    if here is not None:
        memory |= {"least": round(needs.least), "most": round(needs.most)}
    if here is not None and here.machine is not None:
        cluster = step_time.Cluster(here.machine, here.nodes, backend.kind, backend.replicate, backend.context)
        taken = step_time.step_time(cost, loop.asked, loop.batch, loop.accumulation, cluster)
        rate = {
            "tokens_per_second": asdict(taken.total.rate(loop.tokens(backend))),
            "rests_on": taken.rests_on + (", the network between machines not counted" if here.nodes > 1 else ""),
        }
    return {
        "name": loop.name,
        "parameters": {key: getattr(cost.parameters, key) for key in ("total", "trainable", "embeddings")},
        "max_length": loop.length * backend.context,
        "per_device_train_batch_size": loop.batch // loop.pairs,
        "gradient_accumulation_steps": loop.accumulation,
        "memory": memory,
        "verdict": needs.verdict(here.bytes) if here else None,
        "change": None,
        **rate,
    }


def change(recipe: Recipe, model: ModelShape, on: tuple[Backend, Here], nth: int, cost: Cost) -> str | None:
    """The smallest change with which a loop surely fits, as it is said on the command line: fewer sequences at once, which changes
    nothing else; else Liger's kernels, activation checkpointing, both, shards. None where none does."""
    backend, here = on
    loop = _loops(recipe, model, backend)[nth]
    if batch := _batch(loop, cost, backend, here):
        return f"--set training.per_device_train_batch_size={batch}"
    others = [(how, changed, there, _loops(changed, model, there)[nth]) for how, changed, there in _changes(recipe, model, backend)]
    try:
        costs = apart([(other.asked, other.length) for *_, other in others])
    except NotForeseen:
        return None
    for (how, _, there, other), known in zip(others, costs, strict=True):
        if batch := _batch(other, known, there, here):
            return how if batch >= other.batch // other.pairs else f"{how} --set training.per_device_train_batch_size={batch}"
    return None


def _batch(loop: Loop, cost: Cost, backend: Backend, here: Here) -> int:
    """The most rows on a device that surely fit and divide the global batch; 0 where not even one fits."""
    split = memory_budget.fitting(cost, loop, here.bytes, backend)
    return min(split.per_device, loop.batch // loop.pairs) if split else 0


def _changes(recipe: Recipe, model: ModelShape, backend: Backend) -> Iterator[tuple[str, Recipe, Backend]]:
    """Changes that take less memory and leave what is learned as it is: how they are said, and what comes of them."""
    training = recipe.config.training
    wanted: list[dict[str, Any]] = []
    kernels, checkpointing = {"use_liger_kernel": True}, {"activation_checkpointing": True}
    if not training.use_liger_kernel and _has_liger(recipe, model):
        wanted.append(kernels)
    if not training.activation_checkpointing:
        wanted.append(checkpointing)
    if len(wanted) == 2:
        wanted.append(kernels | checkpointing)
    for sets in wanted:
        yield " ".join(f"--set training.{key}=true" for key in sets), _with(recipe, sets), backend
    if backend.kind == "ddp" and getattr(recipe.config, "adapter", None) != "qlora":
        shards = Backend("fsdp2", backend.world, backend.rank)
        yield "--accelerate-config fsdp", recipe, shards
        for sets in wanted[-1:]:
            yield " ".join(["--accelerate-config fsdp", *(f"--set training.{key}=true" for key in sets)]), _with(recipe, sets), shards


def _with(recipe: Recipe, sets: dict[str, Any]) -> Recipe:
    return replace(recipe, config=replace(recipe.config, training=replace(recipe.config.training, **sets)))


def _has_liger(recipe: Recipe, model: ModelShape) -> bool:
    try:
        liger_kernels.check(_with(recipe, {"use_liger_kernel": True}), str(model.config["model_type"]))
    except AzrecipeError:
        return False
    return True


def told(found: dict[str, Any]) -> list[str]:
    """plan.json as lines of progress."""
    lines = []
    for loop in found["loops"]:
        memory, rate = loop["memory"], loop["tokens_per_second"]
        parts = [f"{amount(memory['peak'])} of tensors at the peak"]
        if found["card"]:
            name = found["card"]["name"] or found["device"]
            around = (
                f"{amount(memory['least'])}–{amount(memory['most'])} with all around them, of {amount(found['card']['bytes'])} ({name})"
            )
            parts.append(around)
        if rate:
            parts.append(f"{rate['low']:,.0f}–{rate['high']:,.0f} tokens/s")
        elif found["card"]:
            parts.append("no rate: this card is not known")
        lines.append(f"  foreseen, {loop['name']}: {', '.join(parts)}")
        if loop["verdict"] in ("may fit", "does not fit"):
            may = "does not fit" if loop["verdict"] == "does not fit" else "may not fit"
            lines.append(f"  warning: {loop['name']} {may} on this card. {_advice(loop['change'])}")
    return lines


def _advice(how: str | None) -> str:
    return (
        f"What fits: {how}"
        if how
        else "No single change that keeps the result makes it fit: more cards, larger ones, or a smaller data.max_length"
    )


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / hardware.GIB:.1f} GiB" if size >= hardware.GIB else f"{size / 2**20:.1f} MiB"


@contextlib.contextmanager
def explained(place: RunDir) -> Iterator[None]:
    """Say beside a GPU's lack of memory what was foreseen of the loop that it ended."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        plain, more = explain(error), _beside(place)
        raise (CannotRun(f"{plain}\n  {more}") if more else plain or error) from error


def _beside(place: RunDir) -> str:
    """What plan.json says of the loop that was begun last; nothing where none was, or nothing is foreseen."""
    try:
        found, said = read_json(place.path / FILE), event_log.read(place.path)
    except (OSError, ValueError):
        return ""
    last = said[-1] if said else {}
    loop = next((loop for loop in (found or {}).get("loops", []) if loop["name"] == last.get("phase")), None)
    if loop is None or not found["card"] or last.get("event") != "training":
        return ""
    memory, card, now = loop["memory"], found["card"], loop["per_device_train_batch_size"]
    begun = (
        f"Foreseen for {loop['name']}: {amount(memory['least'])}–{amount(memory['most'])} of {amount(card['bytes'])} ({loop['verdict']})"
    )
    if loop["verdict"] != "fits":
        return f"{begun}. {_advice(loop['change'])}"
    fewer = f", or --set training.per_device_train_batch_size={now // 2}" if now > 1 else ""
    return f"{begun}: the estimate was too low, or another process has memory of this card (nvidia-smi tells){fewer}"


def apart(steps: Steps) -> list[Cost]:
    """`cost_cache.costs` in a process that sees no GPU and no launch. Raises NotForeseen: it failed, or took too long (LIMIT)."""
    seconds = float(os.environ.get(LIMIT) or SECONDS)
    if (known := cost_cache.known(steps)) is not None:
        return known
    gone = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH)}
    process = subprocess.Popen(
        [sys.executable, "-m", "azrecipe.planning.run_estimate"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=kept | gone, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps([[asdict(asked), length] for asked, length in steps]), timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NotForeseen(f"it took more than {seconds:g} s ({LIMIT} allows more)") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too
            process.communicate()
    if process.returncode:
        raise NotForeseen((err.strip().splitlines() or [f"the process that works it out ended with {process.returncode}"])[-1])
    return [from_plain(cost) for cost in json.loads(out.splitlines()[-1])]


def _asked(data: dict[str, Any]) -> Asked:
    lora = Lora(**data["lora"]) if data["lora"] else None
    return Asked(**{**data, "lora": lora, "trainable": tuple(data["trainable"]), "kernels": tuple(data["kernels"])})


def _main() -> None:
    """The other side of `apart`."""
    steps = [(_asked(asked), length) for asked, length in json.load(sys.stdin)]
    print(json.dumps([cost.plain() for cost in cost_cache.costs(steps)]))


if __name__ == "__main__":
    _main()
