"""Print the estimates of `azrecipe plan` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from azrecipe.hardware import GIB
from azrecipe.operations.machine_ranking import MachineRanking
from azrecipe.planning.decision import compute_cost, describe_comparison, format_bounds, format_hours
from azrecipe.planning.estimate import sum_pipeline
from azrecipe.planning.estimate_types import Bounds
from azrecipe.utils.console import print_line
from azrecipe.utils.rich_console import TerminalConsole, open_console

WIDTH = 140  # columns

UNVERIFIED_NOTE = (
    "Nothing of this was measured on a GPU: bytes are PyTorch's own count of the step's tensors, times are computed (docs/plan.md)."
)


def show_plan(answer: Mapping[str, Any]) -> None:
    """Print the estimate of a recipe on machines."""
    console = open_console(WIDTH)
    card = answer["card"]
    console.print(f"{answer['recipe']} {answer['decision']}")
    _show_unknown_cards([answer], console)
    console.print(
        f"{answer['recipe']} on {answer['hardware']} ({_format_gib(card['bytes'])} each), {answer['backend']}, vocabulary {answer['vocab_size']:,}"
    )
    table = Table(title="What each training loop needs", title_justify="left")
    table.add_column("")
    for loop in answer["loops"]:
        table.add_column(loop["name"], justify="right")
    for name, cells in _build_rows(answer["loops"]):
        table.add_row(name, *cells)
    console.print(table)
    _show_alternatives(answer, console)
    if answer["hours"]:
        _show_price(answer, console)
    _show_network_advice(answer, console)
    slow = sum(loop["hours_without_efa"] or 0.0 for loop in answer["loops"])
    if slow:
        console.print(
            f"with EFA not in use, as it seems to have been in the published training on two p4d.24xlarge: {slow:.1f} hours. Check it first"
        )
    for note in answer["notes"]:
        console.print(f"note: {note}")
    for basis in dict.fromkeys(loop["rests_on"] for loop in answer["loops"]):
        console.print(f"time rests on {basis}; a run of your own makes it better: azrecipe plan --calibrate RUN")
    console.print(UNVERIFIED_NOTE)


def _build_rows(loops: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    parts = list(loops[0]["memory"]["parts"])
    rows = [
        ("parameters", [f"{loop['parameters']['total']:,}" for loop in loops]),
        ("trainable", [f"{loop['parameters']['trainable']:,}" for loop in loops]),
        ("of embeddings and head", [f"{loop['parameters']['embeddings']:,}" for loop in loops]),
        ("sequences × tokens × accumulated", [_format_batch(loop) for loop in loops]),
        *((f"  {name}", [_format_gib(loop["memory"]["parts"][name]) for loop in loops]) for name in parts),
        ("peak of tensors on a card", [_format_gib(loop["memory"]["peak"]) for loop in loops]),
        ("  while measuring", [_format_gib(loop["memory"]["measuring"]) if loop["memory"]["measuring"] else "–" for loop in loops]),
        ("with context and allowance", [f"{_format_gib(loop['memory']['least'])}–{_format_gib(loop['memory']['most'])}" for loop in loops]),
        ("on this card", [loop["verdict"] for loop in loops]),
        ("largest batch: surely, perhaps", [f"{loop['largest_batch']['surely']}, {loop['largest_batch']['perhaps']}" for loop in loops]),
        ("largest that divides the global batch", [str(loop["fitting_batch"] or "none") for loop in loops]),
        ("seconds a step", [_format_range(loop["step_seconds"], "{:.2f}") for loop in loops]),
        ("  waits for", [loop["bound"] for loop in loops]),
        ("tokens/s, all cards", [_format_range(loop["tokens_per_second"], "{:,.0f}") for loop in loops]),
        ("steps", [f"{loop['steps']:,}" if loop["steps"] else "–" for loop in loops]),
        ("tokens", [f"{loop['tokens']:,}" if loop["tokens"] else "–" for loop in loops]),
        ("hours", [_format_hours(loop["hours"]) for loop in loops]),
        ("USD on demand", [_format_range((loop["cost"] or {}).get("on_demand"), "{:,.0f}") for loop in loops]),
        ("USD spot", [_format_range((loop["cost"] or {}).get("spot"), "{:,.0f}") for loop in loops]),
    ]
    for path in dict.fromkeys(path for loop in loops for path in loop["epochs"]):
        rows.append((f"epochs of {path}", [f"{loop['epochs'][path]:.2f}" if path in loop["epochs"] else "–" for loop in loops]))
    return rows


def _format_batch(loop: Mapping[str, Any]) -> str:
    return f"{loop['per_device_train_batch_size']} × {loop['max_length']:,} × {loop['gradient_accumulation_steps']}"


def _show_alternatives(answer: Mapping[str, Any], console: TerminalConsole) -> None:
    changes = answer["levers"]["changes"]
    if not changes:
        return
    table = Table(title=f"What one change does to {answer['levers']['of']}, each at its best batch, best first", title_justify="left")
    for name in ("change", "peak at this batch", "", "largest batch", "tokens/s at best batch", "", "how"):
        table.add_column(name, justify="left" if name in ("change", "how") else "right")
    for line in changes:
        rate = line["tokens_per_second"]
        table.add_row(
            line["change"],
            _format_gib(line["peak"]),
            f"{line['difference'] / GIB:+.1f}",
            str(line["largest_batch"]["surely"]),
            f"{rate['middle']:,.0f} at {line['best_batch']}" if rate else "does not fit",
            f"{line['faster']:+.0%}" if line["faster"] is not None else "",
            line["how"],
        )
    console.print(table)


def _show_network_advice(answer: Mapping[str, Any], console: TerminalConsole) -> None:
    """Print what helps where the network limits a step."""
    bound = [loop["name"] for loop in answer["loops"] if loop["bound"] == "network"]
    if not bound:
        return
    hsdp = next((line for line in answer["levers"]["changes"] if line["how"] == "--accelerate-config hsdp"), None)
    console.print(
        f"the network bounds {', '.join(bound)}: {answer['backend']} sends parameters or gradients across for every batch, so a larger batch on each card helps "
        "and accumulating more does not; HSDP keeps them inside a machine"
        + (f" ({hsdp['faster']:+.0%})" if hsdp and hsdp["faster"] is not None else "")
        if answer["backend"] in ("fsdp2", "zero3", "zero2")
        else f"the network bounds {', '.join(bound)}: what crosses it is gradients, once a step, so accumulating more (a larger global batch) helps"
    )


def _show_price(answer: Mapping[str, Any], console: TerminalConsole) -> None:
    hours = answer["hours"]
    console.print(f"{_format_hours(hours)} hours in all, without start, checkpoints and measuring")
    for name, price in answer["price"].items():
        if price:
            total = compute_cost(hours, price)
            region, day = price["region"] or "your own", f", {price['as_of']}" if price["as_of"] else ""
            console.print(
                f"  {name.replace('_', ' ')}: {_format_range(total, '{:,.0f}')} USD at {price['usd_per_hour']:,.2f} an hour ({region} price{day})"
            )


def show_machine_comparison(answers: Sequence[Mapping[str, Any]]) -> None:
    """Print the estimates of a recipe on several machines."""
    console = open_console(WIDTH)
    table = Table(title=f"{answers[0]['recipe']}: machines compared", title_justify="left")
    names = ("machines", "loop", "peak", "on this card", "largest batch\n(usable)", "tokens/s", "waits for", "hours", "USD", "rests on")
    for name in names:
        table.add_column(name, justify="left" if name in ("machines", "loop", "rests on") else "right", overflow="fold")
    for answer in answers:
        for loop in answer["loops"]:
            table.add_row(
                answer["hardware"],
                loop["name"],
                _format_gib(loop["memory"]["peak"]),
                loop["verdict"],
                f"{loop['largest_batch']['surely']} ({loop['fitting_batch']})",
                _format_range(loop["tokens_per_second"], "{:,.0f}"),
                loop["bound"],
                _format_hours(loop["hours"]),
                _format_range((loop["cost"] or {}).get("on_demand"), "{:,.0f}"),
                loop["rests_on"],
            )
    console.print(f"{answers[0]['recipe']} {describe_comparison(answers)}")
    _show_unknown_cards(answers, console)
    console.print(table)
    for note in dict.fromkeys(note for answer in answers for note in answer["notes"]):
        console.print(f"note: {note}")
    console.print(UNVERIFIED_NOTE)


def show_machine_ranking(ranking: MachineRanking) -> None:
    """Print machines, cheapest first."""
    console = open_console(WIDTH)
    sold = [one for one in ranking.machines if one.unit == "USD"]
    if sold:
        fastest = min(sold, key=lambda one: one.hours["middle"])
        console.print(
            f"{ranking.recipe}: cheapest that fits: {sold[0].name}, {_format_money(sold[0].cost)} USD; "
            f"fastest: {fastest.name}, {_format_hours(fastest.hours)} h, {_format_money(fastest.cost)} USD"
        )
    table = Table(title="Machines on which it fits, cheapest first", title_justify="left")
    for name in ("machines", "provider", "batch", "hours", "cost", "price of", "runs known"):
        table.add_column(name, justify="right" if name in ("batch", "hours", "cost") else "left", overflow="fold")
    for one in ranking.machines:
        batches = ", ".join(map(str, dict.fromkeys(one.batches)))
        cost = f"{_format_money(one.cost)} {one.unit}"
        known = "on this chip" if one.card_is_known else "none on this chip"
        table.add_row(one.name, one.provider, batches, _format_hours(one.hours), cost, one.priced, known)
    console.print(table)
    for reason, count in ranking.left_out.items():
        console.print(f"{count} machines are left out: {reason}")
    console.print(
        "Prices are list prices of one region on one day, without storage, transfer and taxes. Prices of spot machines are not ranked."
    )
    console.print(UNVERIFIED_NOTE)


def _format_money(bounds: Mapping[str, float]) -> str:
    return format_bounds(bounds, "{:,.0f}" if bounds["low"] >= 10 else "{:,.2f}")


def show_pipeline_comparison(estimates: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Print the hours and prices of a whole pipeline on each machine.

    Args:
        estimates: For each recipe, an estimate for each machine.
    """
    console = open_console(WIDTH)
    table = Table(title="All steps", title_justify="left")
    for name in ("machines", "hours", "USD on demand"):
        table.add_column(name, justify="left" if name == "machines" else "right")
    totals = [sum_pipeline(answers) for answers in zip(*estimates, strict=True)]
    for total in totals:
        hours = total["hours"]
        cost = compute_cost(hours, total["price"]["on_demand"])
        table.add_row(total["hardware"], _format_hours(hours) if hours else "a step does not fit", _format_range(cost, "{:,.0f}"))
    console.print(table)
    console.print(f"The whole pipeline: {describe_comparison(totals)}")


def _show_unknown_cards(answers: Sequence[Mapping[str, Any]], console: TerminalConsole) -> None:
    """Say on which cards no run is known."""
    cards = dict.fromkeys(answer["card"]["name"] for answer in answers if not all(loop["card_is_known"] for loop in answer["loops"]))
    if cards:
        console.print(f"no run on {', '.join(cards)} is known: the times rest on other cards")


def show_pipeline_total(answer: Mapping[str, Any], hours: Bounds | None) -> None:
    """Print the hours and price of a whole pipeline.

    Prices are those of `answer`, one of its estimates.
    """
    console = open_console(WIDTH)
    if hours is None:
        console.print("no total: a step does not fit, or its length is not known")
    else:
        _show_price({**answer, "hours": hours}, console)


def show_largest_batches(answer: Mapping[str, Any]) -> None:
    """Print the largest batch of each loop, one a line.

    A line has the batch that certainly fits, and the one that perhaps does.
    """
    for loop in answer["loops"]:
        print_line(
            f"{answer['recipe']}\t{answer['hardware']}\t{loop['name']}\t{loop['largest_batch']['surely']}\t{loop['largest_batch']['perhaps']}"
        )


def _format_gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _format_hours(bounds: Mapping[str, float] | None) -> str:
    return format_hours(bounds) if bounds else "–"


def _format_range(bounds: Mapping[str, float] | None, spec: str) -> str:
    return format_bounds(bounds, spec) if bounds else "–"
