"""The published training of Llama 3.2 1B beside what the planner says of it: memory, largest batches, model states, times.

    python benchmarks/plan_published.py
    python benchmarks/plan_published.py --points [SOURCE …]

With --points: the published trainings of benchmarks/published_points.yaml, of all sources or of those named; the first time it takes some minutes.

Published: 8 × H100 (p5.48xlarge) and 16 × A100 40 GB (two p4d.24xlarge), sequences of 2,048, bfloat16, AdamW. What was not published is said
beside each figure. Nothing here is tuned to agree: memory has no constant of ours but those in planning/memory_budget.py, and each time is predicted
from the others' efficiency (leave one out).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import point_coverage
import published_points
from point_coverage import Prediction

from azrecipe import hardware
from azrecipe.errors import CommandError
from azrecipe.planning import memory_budget, step_time
from azrecipe.planning.model_config import load_model_config
from azrecipe.planning.simulation import cost_cache
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.planning.step_time import MachineGroup
from azrecipe.recipe.types import ModelSource

LENGTH = 2048
LIGER = {"kernels": ("rms_norm", "swiglu"), "head": "liger"}
GB = 1e9
EFFICIENCIES = Path(__file__).resolve().parents[1] / "hardware" / "efficiencies.yaml"
EFFICIENCIES_HEAD = """\
# The share of its card's roofline that each published run reached: the time that the roofline gives for its step (every operator as long as its
# arithmetic or its memory traffic takes at the card's peak, whichever is longer), over the time that it took. `azrecipe plan` computes time with it.
# Your own runs count instead of these: azrecipe plan --calibrate RUN.
# Generated from benchmarks/published_points.yaml, which holds each configuration and what is assumed of it:
#   python benchmarks/plan_published.py --points --write
"""


def llama() -> dict[str, object]:
    """Llama 3.2 1B, from the project's own table of shapes."""
    return load_model_config(ModelSource("meta-llama/Llama-3.2-1B", None, None))[0]


@dataclass(frozen=True)
class Timed:
    """A published time: seconds of a step of `batch` sequences on each card, and where."""

    name: str
    asked: StepSpec
    batch: int
    seconds: float
    cluster: MachineGroup
    assumed: str


def line(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def error(found: float, published: float) -> str:
    return f"{100 * (found / published - 1):+.1f} %"


def memory(fsdp: StepCost, liger: StepCost) -> None:
    print("\n## Peak memory, FSDP, 8 × H100, batch 10 (published: 64 and 27 GB; tokenizer's size and unit not published)\n")
    line("case", "predicted GiB", "predicted GB", "published", "error as GiB", "error as GB")
    line(*["---"] * 6)
    for name, cost, published in (("FSDP", fsdp, 64), ("FSDP + Liger", liger, 27)):
        peak = sum(cost.get_peak_memory(10, 8).values())
        line(
            name,
            f"{peak / hardware.GIB:.1f}",
            f"{peak / GB:.1f}",
            published,
            error(peak / hardware.GIB, published),
            error(peak / GB, published),
        )
    states = 4 * 2 * fsdp.parameters.total  # weights, gradients and two moments in bfloat16
    print("\n## Model states (weights, gradients, two moments, bfloat16)\n")
    line("case", "predicted GiB", "published", "error")
    line(*["---"] * 4)
    line("whole", f"{states / hardware.GIB:.2f}", 9.23, error(states / hardware.GIB, 9.23))
    line("on each of 8", f"{states / 8 / hardware.GIB:.2f}", 1.17, error(states / 8 / hardware.GIB, 1.17))


def batches(found: dict[str, tuple[StepCost, StepSpec]]) -> None:
    print("\n## Largest batch (published ones are all even)\n")
    line("case", "A100 40 GB: surely – perhaps", "published", "H100 80 GB: surely – perhaps", "published")
    line(*["---"] * 5)
    published = {"FSDP": (4, 10), "FSDP + Liger": (14, 18), "DDP, float32": (2, 4), "DDP, bf16_mixed": (2, 4), "DDP, bf16_pure": (2, 4)}
    for name, (cost, asked) in found.items():
        cells = []
        for card, said in zip(("a100-40g", "h100-80g"), published[name], strict=True):
            total = hardware.find_machine(card).card.total_memory_gib * hardware.GIB
            cells += ["{} – {}".format(*memory_budget.find_largest_batches(cost, asked, total, 8)), said]
        line(name, *cells)


def times(timed: list[Timed]) -> None:
    print("\n## Time (one efficiency of cards and one of the network; each predicted from the other three)\n")
    line("case", "predicted s a step", "published s a step", "error", "share of roofline", "assumed")
    line(*["---"] * 6)
    costs = cost_cache.load_or_simulate_costs([(t.asked, LENGTH) for t in timed])
    rooflines = [_alone(cost, t) for cost, t in zip(costs, timed, strict=True)]
    for i, (cost, t) in enumerate(zip(costs, timed, strict=True)):
        others = [j for j in range(len(timed)) if j != i]
        share = statistics.median(rooflines[j] / timed[j].seconds for j in others if timed[j].cluster.nodes == 1)
        crossing = [(_crossing(costs[j], timed[j]), timed[j].seconds) for j in others if timed[j].cluster.nodes > 1]
        found = rooflines[i] / share
        if t.cluster.nodes > 1:
            rate = statistics.median(volume / seconds for volume, seconds in crossing)
            found = max(found, _crossing(cost, t) / rate)
        own = f"{rooflines[i] / t.seconds:.3f}"
        line(t.name, f"{found:.3f}", f"{t.seconds:.3f}", error(found, t.seconds), own, t.assumed)
    for j, t in enumerate(timed):
        if t.cluster.nodes > 1 and t.cluster.machine.network is not None:
            rate = _crossing(costs[j], t) / t.seconds
            of = rate / (t.cluster.machine.network.gbit_per_s / 8 * GB)
            print(f"\n{t.name}: the network would have carried {rate / GB:.2f} GB/s, {of:.1%} of what it is sold for.", end="")
    print(
        "\n\nBoth phases on two p4d take 2.5 to 3 times what the cards need, in the proportion of the bytes that cross the network: the network"
        "\nbounds them, at a rate that TCP gives and EFA far exceeds. HSDP sends only gradients across; what it would take, with the network as it was:"
    )
    for cost, t in zip(costs, timed, strict=True):
        if t.cluster.nodes > 1:
            _, summed = step_time.count_communication_bytes(cost, t.asked, 1)
            rate = _crossing(cost, t) / t.seconds
            print(f"  {t.name}: {max(_alone(cost, t) / 0.9, summed / rate):.2f} s a step instead of {t.seconds:.2f}")


def _alone(cost: StepCost, t: Timed) -> float:
    return step_time.compute_roofline(cost, t.asked, t.batch, 1, t.cluster)


def _crossing(cost: StepCost, t: Timed) -> float:
    gathered, summed = step_time.count_communication_bytes(cost, t.asked, 1)
    return (gathered + summed) * (t.cluster.world_size - 1) / t.cluster.world_size


def write_efficiencies(predictions: Sequence[Prediction]) -> None:
    """Write hardware/efficiencies.yaml: the share of the roofline that each published run reached."""
    sources = published_points.read_sources()
    lines = []
    for p in sorted((p for p in predictions if point_coverage.tells_efficiency(p)), key=lambda p: (p.point.card, p.point.kind)):
        (run,) = point_coverage.list_efficiency_runs([p])
        values = {"source": run.source, "card": run.card, **run.kind._asdict(), "efficiency": run.efficiency, "what": f'"{p.point.name}"'}
        lines.append("  - {" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}\n")
    known = {p.point.source for p in predictions if point_coverage.tells_efficiency(p)}
    lines.insert(0, "runs:\n")
    about = [f"  {name}: {{date: {source['date']}, url: {source['url']}}}\n" for name, source in sources.items() if name in known]
    EFFICIENCIES.write_text("".join([EFFICIENCIES_HEAD, "sources:\n", *about, *lines]), encoding="utf-8")
    print(f"wrote {EFFICIENCIES}: {len(lines) - 1} runs of {len(known)} sources")


def points(chosen: list[str], write: bool) -> int:
    """Print the planner's answer for each published point, and how many of them its ranges hold; `write`: efficiencies.yaml first."""
    known = published_points.read_points()
    if unknown := set(chosen) - {point.source for point in known}:
        print(
            f"unknown sources: {', '.join(sorted(unknown))}. Known: {', '.join(sorted({point.source for point in known}))}", file=sys.stderr
        )
        return 2
    asked = [point for point in known if not chosen or point.source in chosen]
    costs, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CONFIG_HOME"] = folder  # the user's own calibrated runs do not count here
        with contextlib.suppress(CommandError):  # simulates all that it can, in parallel; what fails is named below
            cost_cache.load_or_simulate_costs([(point.step, point.length) for point in asked])
        for point in asked:
            try:
                (cost,) = cost_cache.load_or_simulate_costs([(point.step, point.length)])
                costs[point.name] = cost
            except CommandError as error:
                failed.append(f"{point.name}: {error}")
        predictions = [point_coverage.predict_point(point, costs[point.name]) for point in asked if point.name in costs]
        if write:
            write_efficiencies(predictions)
            return 0
        point_coverage.print_points(predictions)
        point_coverage.print_coverage(predictions)
        point_coverage.print_left_out(predictions, costs)
    print("".join(f"\nnot planned: {text}" for text in failed))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", nargs="*", metavar="SOURCE", help="hold the published points against the planner")
    parser.add_argument(
        "--write", action="store_true", help="with --points: write hardware/efficiencies.yaml from all of them, and print nothing else"
    )
    arguments = parser.parse_args()
    return compare_llama() if arguments.points is None else points(arguments.points, arguments.write)


def compare_llama() -> int:
    config = llama()
    plain = StepSpec(config=config, precision="bf16_pure", strategy="fsdp2", shards=8)
    liger = replace(plain, **LIGER)
    ddp = {f"DDP, {p}": replace(plain, precision=p, strategy="ddp", shards=1) for p in ("float32", "bf16_mixed", "bf16_pure")}
    cases = {"FSDP": plain, "FSDP + Liger": liger, **ddp}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "accelerate"))
    print(
        f"azrecipe plan beside the published figures. {platform.machine()}, Python {platform.python_version()}, {versions}; no GPU was used."
    )
    known = dict(zip(cases, cost_cache.load_or_simulate_costs([(asked, LENGTH) for asked in cases.values()]), strict=True))
    memory(known["FSDP"], known["FSDP + Liger"])
    batches({name: (known[name], asked) for name, asked in cases.items()})
    p5 = MachineGroup(hardware.find_machine("p5.48xlarge"), 1, "fsdp2")
    p4d = MachineGroup(hardware.find_machine("p4d.24xlarge"), 2, "fsdp2")
    frozen = replace(liger, trainable=("embeddings",))
    times([
        Timed("p5, FSDP, 63,771 tokens/s/GPU", plain, 10, 10 * LENGTH / 63_771, p5, "batch 10"),
        Timed("p5, FSDP + Liger, 78,319 tokens/s/GPU", liger, 18, 18 * LENGTH / 78_319, p5, "batch 18"),
        Timed("2 × p4d, embeddings, 11,400 s / 5,000", frozen, 14, 11_400 / 5_000, p4d, "Liger, FSDP over all 16"),
        Timed("2 × p4d, all, 43,000 s / 15,000", liger, 14, 43_000 / 15_000, p4d, "Liger, FSDP over all 16"),
    ])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
