"""The report of an sft run: curves, losses, conversations, adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report import pretrain_section, training_curves
from azrecipe.report.html import Html, Section, join_html, render_figures, render_table
from azrecipe.report.number_format import format_number
from azrecipe.report.svg_plots import PlotFrame, plot_curves
from azrecipe.runs.reader import RunRecord
from azrecipe.utils.console import format_duration

X_AXIS = "step"
COUNT_LABELS = {
    "conversations": "read",
    "duplicates": "duplicates left out",
    "dropped": "left out: no trained token within max_length",
    "truncated": "cut to max_length",
    "train": "trained on",
    "held_out": "held out",
    "trained_tokens": "tokens with a loss",
}


def collect_headline(run: RunRecord) -> dict[str, str]:
    """Collect the headline."""
    training, data = (run.result.get(key) or {} for key in ("training", "data"))
    return {
        **{f"held-out {name}": _format_change(run.result.get(f"held_out_{name}") or {}) for name in ("loss", "accuracy", "margin")},
        "preferences" if _is_dpo(run) else "conversations": format_number(data.get("train")) if data else "",
        "epochs": f"{training['epochs']:g}" if "epochs" in training else "",
        "steps": format_number(training.get("steps")) if training else "",
        "time": format_duration(training["seconds"]) if "seconds" in training else "",
        "parameters": format_number(run.result.get("parameters")) if run.result else "",
        **pretrain_section.measure_speed_and_memory(run),
    }


def _is_dpo(run: RunRecord) -> bool:
    return run.recipe.get("method") == "dpo"


def _format_change(measured: Mapping[str, Any]) -> str:
    has_both = measured.get("before") is not None and measured.get("after") is not None
    return f"{measured['before']:.3f} → {measured['after']:.3f}" if has_both else ""


def build_sections(run: RunRecord) -> Iterator[Section]:
    """Build the sections of an sft run."""
    figures = training_curves.plot_logged_metrics([run], X_AXIS)
    held_out_plot = _plot_margins(run) if _is_dpo(run) else plot_held_out_loss([run])
    yield Section("Curves", render_figures([*figures[:1], (held_out_plot, ""), *figures[1:]]))
    yield Section("Data", join_html([_render_counts(run.result.get("data") or {}), _render_sources(run)]))
    if run.recipe.get("adapter") != "none":
        yield Section("Adapter", _render_adapter(run.recipe.get("lora") or {}))


def plot_held_out_loss(runs: Sequence[RunRecord]) -> Html:
    """Plot the loss of held-out conversations before, during and after training."""
    plotted = []
    for index, run in enumerate(runs):
        losses, points = run.result.get("held_out_loss") or {}, dict(training_curves.read_points(run, "eval_loss", X_AXIS))
        if losses.get("before") is not None:
            points[0] = losses["before"]
        if losses.get("after") is not None:
            points[(run.result.get("training") or {}).get("steps") or 0] = losses["after"]
        plotted.append(training_curves.thin_curve(run.name, sorted(points.items()), index, training_curves.MAX_POINTS_PER_PLOT))
    return plot_curves(PlotFrame("Loss of held-out conversations", training_curves.X_LABELS[X_AXIS], "nats per trained token"), plotted)


def _plot_margins(run: RunRecord) -> Html:
    """Plot DPO's margin between chosen and rejected answers in training batches."""
    points = dict(training_curves.read_points(run, "rewards/margins", X_AXIS))
    curve = training_curves.thin_curve(run.name, sorted(points.items()), 0, training_curves.MAX_POINTS_PER_PLOT)
    return plot_curves(
        PlotFrame("Margin of the chosen answers (DPO's reward)", training_curves.X_LABELS[X_AXIS], "beta times nats"), [curve]
    )


def _render_sources(run: RunRecord) -> Html:
    """Render what training read of each source."""
    read = (run.result.get("training") or {}).get("sources") or []
    names = [str(source.get("path")) for source in run.recipe.get("data", {}).get("datasets", [])]
    rows = [
        [name, format_number(source["rows"]), format_number(source["bytes"]), f"{source['epochs']:g}"]
        for name, source in zip(names, read, strict=False)
    ]
    return render_table("Training data", ["source", "rows", "bytes of text", "epochs"], rows) if rows else Html("")


def _render_counts(data: Mapping[str, Any]) -> Html:
    labels = {**COUNT_LABELS, **{key: key.replace("_", " ") for key in data if key not in COUNT_LABELS}}
    rows = [[labels[key], format_number(data[key])] for key in labels if isinstance(data.get(key), int | float)]
    return join_html([render_table("Conversations", ["conversations", "count"], rows)])


def _render_adapter(lora: Mapping[str, Any]) -> Html:
    rows = [
        [key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)] for key, value in lora.items() if value is not None
    ]
    return render_table("LoRA", ["key", "value"], rows)
