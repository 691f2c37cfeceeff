"""Knows how an answer reads in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from azrecipe.hardware import GIB

GPU = "Nothing of this was measured on a GPU: bytes are PyTorch's own count of the step's tensors, times are reckoned (docs/plan.md)."


def console() -> Console:
    """Where it is printed; 140 columns wide where there is no terminal."""
    made = Console(highlight=False, markup=False)
    return made if made.is_terminal else Console(highlight=False, markup=False, width=140)


def show(answer: Mapping[str, Any]) -> None:
    """One recipe on one choice of machines."""
    out = console()
    card = answer["card"]
    out.print(
        f"{answer['recipe']} on {answer['hardware']} ({_gib(card['bytes'])} each), {answer['backend']}, vocabulary {answer['vocab_size']:,}"
    )
    table = Table(title="What each training loop needs", title_justify="left")
    table.add_column("")
    for loop in answer["loops"]:
        table.add_column(loop["name"], justify="right")
    for name, cells in _rows(answer["loops"]):
        table.add_row(name, *cells)
    out.print(table)
    _levers(answer, out)
    if answer["hours"]:
        _price(answer, out)
    _network(answer, out)
    slow = sum(loop["hours_without_efa"] or 0.0 for loop in answer["loops"])
    if slow:
        out.print(
            f"with EFA not in use, as it seems to have been in the published training on two p4d.24xlarge: {slow:.1f} hours. Check it first"
        )
    for note in answer["notes"]:
        out.print(f"note: {note}")
    for rests_on in dict.fromkeys(loop["rests_on"] for loop in answer["loops"]):
        out.print(f"time rests on {rests_on}; a run of your own makes it better: azrecipe plan --calibrate RUN")
    out.print(GPU)


def _rows(loops: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    parts = list(loops[0]["memory"]["parts"])
    rows = [
        ("parameters", [f"{loop['parameters']['total']:,}" for loop in loops]),
        ("trainable", [f"{loop['parameters']['trainable']:,}" for loop in loops]),
        ("of embeddings and head", [f"{loop['parameters']['embeddings']:,}" for loop in loops]),
        ("sequences × tokens × accumulated", [_batch(loop) for loop in loops]),
        *((f"  {name}", [_gib(loop["memory"]["parts"][name]) for loop in loops]) for name in parts),
        ("peak of tensors on a card", [_gib(loop["memory"]["peak"]) for loop in loops]),
        ("with context and allowance", [f"{_gib(loop['memory']['least'])}–{_gib(loop['memory']['most'])}" for loop in loops]),
        ("on this card", [loop["verdict"] for loop in loops]),
        ("largest batch: surely, perhaps", [f"{loop['largest_batch']['surely']}, {loop['largest_batch']['perhaps']}" for loop in loops]),
        ("seconds a step", [_span(loop["step_seconds"], "{:.2f}") for loop in loops]),
        ("  waits for", [loop["bound"] for loop in loops]),
        ("tokens/s, all cards", [_span(loop["tokens_per_second"], "{:,.0f}") for loop in loops]),
        ("steps", [f"{loop['steps']:,}" if loop["steps"] else "–" for loop in loops]),
        ("tokens", [f"{loop['tokens']:,}" if loop["tokens"] else "–" for loop in loops]),
        ("hours", [_hours(loop["hours"]) for loop in loops]),
        ("USD on demand", [_span((loop["cost"] or {}).get("on_demand"), "{:,.0f}") for loop in loops]),
        ("USD spot", [_span((loop["cost"] or {}).get("spot"), "{:,.0f}") for loop in loops]),
    ]
    for path in dict.fromkeys(path for loop in loops for path in loop["epochs"]):
        rows.append((f"epochs of {path}", [f"{loop['epochs'][path]:.2f}" if path in loop["epochs"] else "–" for loop in loops]))
    return rows


def _batch(loop: Mapping[str, Any]) -> str:
    return f"{loop['per_device_train_batch_size']} × {loop['max_length']:,} × {loop['gradient_accumulation_steps']}"


def _levers(answer: Mapping[str, Any], out: Console) -> None:
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
            _gib(line["peak"]),
            f"{line['difference'] / GIB:+.1f}",
            str(line["largest_batch"]["surely"]),
            f"{rate['middle']:,.0f} at {line['best_batch']}" if rate else "does not fit",
            f"{line['faster']:+.0%}" if line["faster"] is not None else "",
            line["how"],
        )
    out.print(table)


def _network(answer: Mapping[str, Any], out: Console) -> None:
    """Where the network bounds a step: what helps."""
    bound = [loop["name"] for loop in answer["loops"] if loop["bound"] == "network"]
    if not bound:
        return
    hsdp = next((line for line in answer["levers"]["changes"] if line["how"] == "--accelerate-config hsdp"), None)
    out.print(
        f"the network bounds {', '.join(bound)}: {answer['backend']} sends parameters or gradients across for every batch, so a larger batch on each card helps "
        "and accumulating more does not; HSDP keeps them inside a machine"
        + (f" ({hsdp['faster']:+.0%})" if hsdp and hsdp["faster"] is not None else "")
        if answer["backend"] in ("fsdp2", "zero3", "zero2")
        else f"the network bounds {', '.join(bound)}: what crosses it is gradients, once a step, so accumulating more (a larger global batch) helps"
    )


def _price(answer: Mapping[str, Any], out: Console) -> None:
    hours = answer["hours"]
    out.print(f"{_hours(hours)} hours in all, without start, checkpoints and measuring")
    for name, price in answer["price"].items():
        if price:
            total = {key: value * price["usd_per_hour"] for key, value in hours.items()}
            region, day = price["region"] or "your own", f", {price['as_of']}" if price["as_of"] else ""
            out.print(
                f"  {name.replace('_', ' ')}: {_span(total, '{:,.0f}')} USD at {price['usd_per_hour']:,.2f} an hour ({region} price{day})"
            )


def compare(answers: Sequence[Mapping[str, Any]]) -> None:
    """One recipe on several choices of machines."""
    out = console()
    table = Table(title=f"{answers[0]['recipe']}: machines compared", title_justify="left")
    for name in ("machines", "loop", "peak", "on this card", "largest batch", "tokens/s", "waits for", "hours", "USD on demand"):
        table.add_column(name, justify="left" if name in ("machines", "loop") else "right")
    for answer in answers:
        for loop in answer["loops"]:
            table.add_row(
                answer["hardware"],
                loop["name"],
                _gib(loop["memory"]["peak"]),
                loop["verdict"],
                str(loop["largest_batch"]["surely"]),
                _span(loop["tokens_per_second"], "{:,.0f}"),
                loop["bound"],
                _hours(loop["hours"]),
                _span((loop["cost"] or {}).get("on_demand"), "{:,.0f}"),
            )
    out.print(table)
    for note in dict.fromkeys(note for answer in answers for note in answer["notes"]):
        out.print(f"note: {note}")
    out.print(GPU)


def whole(answer: Mapping[str, Any], hours: Mapping[str, float] | None) -> None:
    """What a pipeline's training takes together, at the prices of one of its answers."""
    if hours is not None:
        _price({**answer, "hours": hours}, console())


def largest(answer: Mapping[str, Any]) -> None:
    """The largest batch of each loop, one a line: its name, surely, perhaps."""
    for loop in answer["loops"]:
        print(
            f"{answer['recipe']}\t{answer['hardware']}\t{loop['name']}\t{loop['largest_batch']['surely']}\t{loop['largest_batch']['perhaps']}"
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _hours(span: Mapping[str, float] | None) -> str:
    return _span(span, "{:.1f}" if span and span["low"] >= 1 else "{:.2f}")


def _span(span: Mapping[str, float] | None, form: str) -> str:
    if not span:
        return "–"
    low, middle, high = (form.format(span[key]) for key in ("low", "middle", "high"))
    return middle if low == high else f"{middle} ({low}–{high})"
