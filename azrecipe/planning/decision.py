"""The first sentence of a plan: whether it fits, hours and price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from azrecipe.hardware import GIB
from azrecipe.planning.memory_budget import VERDICTS


def describe_decision(answer: Mapping[str, Any]) -> str:
    """Describe what an estimate says, in one sentence.

    Of several loops, the one that fits worst is named.
    """
    loops, where = answer["loops"], answer["hardware"]
    if answer["refusal"]:
        return f"cannot run on {where}: {answer['refusal']}"
    worst = max(loops, key=lambda loop: (VERDICTS.index(loop["verdict"]), loop["memory"]["most"]))
    text = _describe_fit(worst, answer["card"]["bytes"]) + (f" ({worst['name']})" if len(loops) > 1 else "")
    if answer["hours"] is None:
        return f"{text}, on {where}"
    cost = compute_cost(answer["hours"], answer["price"]["on_demand"])
    priced = "no price known" if cost is None else f"{format_bounds(cost, '{:,.0f}')} USD"
    return f"{text}; {format_hours(answer['hours'])} h, {priced} on {where}"


def _describe_fit(loop: Mapping[str, Any], card_bytes: float) -> str:
    """Describe whether a loop fits, and with which batch."""
    memory, batch = loop["memory"], loop["per_device_train_batch_size"]
    most, least = (max(memory[key], memory[other] or 0) for key, other in (("most", "measuring_most"), ("least", "measuring")))
    if loop["verdict"] == "fits":
        return f"fits at {batch} with {(card_bytes - most) / GIB:.1f} GiB to spare"
    usable = f"{loop['fitting_batch']} surely fits" if loop["fitting_batch"] else "no batch surely fits"
    need = f"it needs {least / GIB:.1f} to {most / GIB:.1f} of {card_bytes / GIB:.1f} GiB"
    return f"{loop['verdict']} at {batch}: {need}; {usable}"


def describe_comparison(answers: Sequence[Mapping[str, Any]]) -> str:
    """Name the cheapest and the fastest machines on which a recipe fits."""
    fitting = [answer for answer in answers if answer["hours"] is not None and all(loop["verdict"] == "fits" for loop in answer["loops"])]
    if not fitting:
        return "fits surely on none of these machines"
    fastest = min(fitting, key=lambda answer: float(answer["hours"]["middle"]))
    parts = []
    costs = [(answer["hardware"], compute_cost(answer["hours"], answer["price"]["on_demand"])) for answer in fitting]
    priced = [(name, cost) for name, cost in costs if cost is not None]
    if priced:
        cheapest, cost = min(priced, key=lambda one: one[1]["middle"])
        parts.append(f"cheapest that fits: {cheapest}, {format_bounds(cost, '{:,.0f}')} USD")
        equal = [name for name, other in priced if other is not cost and other["low"] <= cost["high"]]
        if equal:
            parts.append(f"not surely cheaper than {', '.join(equal)}")
    return "; ".join([*parts, f"fastest that fits: {fastest['hardware']}, {format_bounds(fastest['hours'], '{:.1f}')} h"])


def compute_cost(hours: Mapping[str, float] | None, price: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Compute what hours cost in USD; None where either is unknown."""
    return {key: value * price["usd_per_hour"] for key, value in hours.items()} if hours and price else None


def format_hours(hours: Mapping[str, float]) -> str:
    """Format hours and their bounds, short times more precisely."""
    return format_bounds(hours, "{:.1f}" if hours["low"] >= 1 else "{:.2f}")


def format_bounds(bounds: Mapping[str, float], spec: str) -> str:
    """Format a value and its bounds: 11.9 (10.2–14.0)."""
    low, middle, high = (spec.format(bounds[key]) for key in ("low", "middle", "high"))
    return middle if low == high else f"{middle} ({low}–{high})"
