"""Knows how a page shows an sft run: what became of the conversations, losses, curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report import pretrain_section, training_curves
from azrecipe.report.html import Html, Part, joined, plots, table
from azrecipe.report.number_format import number
from azrecipe.report.svg_plots import Frame
from azrecipe.report.svg_plots import curves as drawn
from azrecipe.runs.reader import Run
from azrecipe.utils.console import duration

AXIS = "step"
COUNTS = {
    "conversations": "read",
    "duplicates": "duplicates left out",
    "dropped": "left out: no trained token within max_length",
    "truncated": "cut to max_length",
    "train": "trained on",
    "held_out": "held out",
    "trained_tokens": "tokens with a loss",
}


def facts(run: Run) -> dict[str, str]:
    """The headline."""
    training, data = (run.result.get(key) or {} for key in ("training", "data"))
    return {
        **{f"held-out {name}": _change(run.result.get(f"held_out_{name}") or {}) for name in ("loss", "accuracy", "margin")},
        "preferences" if _preferences(run) else "conversations": number(data.get("train")) if data else "",
        "epochs": f"{training['epochs']:g}" if "epochs" in training else "",
        "steps": number(training.get("steps")) if training else "",
        "time": duration(training["seconds"]) if "seconds" in training else "",
        "parameters": number(run.result.get("parameters")) if run.result else "",
        **pretrain_section.measured(run),
    }


def _preferences(run: Run) -> bool:
    return run.recipe.get("method") == "dpo"


def _change(measured: Mapping[str, Any]) -> str:
    both = measured.get("before") is not None and measured.get("after") is not None
    return f"{measured['before']:.3f} → {measured['after']:.3f}" if both else ""


def parts(run: Run) -> Iterator[Part]:
    """What happened in training."""
    found = training_curves.logged([run], AXIS)
    own = _margins(run) if _preferences(run) else held_out([run])
    yield Part("Curves", plots([*found[:1], (own, ""), *found[1:]]))
    yield Part("Data", joined([_counts(run.result.get("data") or {}), _sources(run)]))
    if run.recipe.get("adapter") != "none":
        yield Part("Adapter", _adapter(run.recipe.get("lora") or {}))


def held_out(runs: Sequence[Run]) -> Html:
    """The loss of held-out conversations over the steps: before, measured on the way, after."""
    found = []
    for nth, run in enumerate(runs):
        told, points = run.result.get("held_out_loss") or {}, dict(training_curves.values(run, "eval_loss", AXIS))
        if told.get("before") is not None:
            points[0] = told["before"]
        if told.get("after") is not None:
            points[(run.result.get("training") or {}).get("steps") or 0] = told["after"]
        found.append(training_curves.curve(run.name, sorted(points.items()), nth, training_curves.MOST))
    return drawn(Frame("Loss of held-out conversations", training_curves.X[AXIS], "nats a trained token"), found)


def _margins(run: Run) -> Html:
    """How much likelier than at the start the chosen answers became against the rejected ones, in the batches trained on."""
    points = dict(training_curves.values(run, "rewards/margins", AXIS))
    curve = training_curves.curve(run.name, sorted(points.items()), 0, training_curves.MOST)
    return drawn(Frame("Margin of the chosen answers (DPO's reward)", training_curves.X[AXIS], "beta times nats"), [curve])


def _sources(run: Run) -> Html:
    """What was read of each source."""
    read = (run.result.get("training") or {}).get("sources") or []
    names = [str(source.get("path")) for source in run.recipe.get("data", {}).get("datasets", [])]
    rows = [[name, number(each["rows"]), number(each["bytes"]), f"{each['epochs']:g}"] for name, each in zip(names, read, strict=False)]
    return table("What was read of each source", ["source", "rows", "bytes of text", "epochs"], rows) if rows else Html("")


def _counts(data: Mapping[str, Any]) -> Html:
    words = {**COUNTS, **{key: key.replace("_", " ") for key in data if key not in COUNTS}}
    rows = [[words[key], number(data[key])] for key in words if isinstance(data.get(key), int | float)]
    return joined([table("What became of the conversations", ["conversations", "count"], rows)])


def _adapter(lora: Mapping[str, Any]) -> Html:
    rows = [
        [key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)] for key, value in lora.items() if value is not None
    ]
    return table("LoRA", ["key", "value"], rows)
