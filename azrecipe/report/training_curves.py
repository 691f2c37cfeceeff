"""Curves of training, from metrics.jsonl."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from azrecipe.report.html import Html
from azrecipe.report.svg_plots import Curve, PlotFrame, plot_curves
from azrecipe.runs.reader import RunRecord


class LoggedMetric(NamedTuple):
    """A value that each training logs."""

    key: str  # in a line of metrics.jsonl
    title: str
    unit: str
    divisor: float  # converts a logged value to the unit


MAX_POINTS_PER_PLOT = 400  # shared by the curves of all runs
MIN_POINTS_PER_CURVE = 80  # however many curves a plot has
X_LABELS = {"tokens": "tokens read", "bytes": "bytes of text read", "step": "step"}
LOGGED_METRICS: Sequence[LoggedMetric] = (
    LoggedMetric("loss", "Training loss", "nats per token", 1),
    LoggedMetric("train_bpb", "Training text", "bits per byte", 1),
    LoggedMetric("learning_rate", "Learning rate", "", 1),
    LoggedMetric("tokens_per_second", "Speed", "tokens/s", 1),
    LoggedMetric("peak_memory_bytes", "Peak memory", "GB", 1e9),
)
METRICS_FROM_ZERO = ("tokens_per_second", "peak_memory_bytes")
THINNED_NOTE = "A point stands for up to {:,} logged steps: their mean, and the band from the lowest to the highest"


def phase_offsets(run: RunRecord, key: str) -> dict[str, float]:
    """Return the value of `key` at the start of each phase.

    `key` is tokens, bytes or step.     The lines of metrics.jsonl count from the start of their phase.
    """
    finished = run.result.get("phases", {})
    totals: dict[str, float] = {}
    for line in run.metrics:
        totals[line.get("phase", "")] = max(totals.get(line.get("phase", ""), 0), line.get(key) or 0)
    for phase, result in finished.items():
        totals[phase] = result.get("steps" if key == "step" else key) or totals.get(phase, 0)
    return dict(zip(totals, accumulate(totals.values(), initial=0), strict=False))


def phase_borders(run: RunRecord, key: str) -> list[tuple[float, str]]:
    """Return each phase's start and name, for several phases."""
    starts = phase_offsets(run, key)
    return [(x, name) for name, x in starts.items()] if len(starts) > 1 else []


def read_points(run: RunRecord, metric: str, key: str) -> list[tuple[float, float]]:
    """Read a logged metric over training.

    Args:
        run: The run.
        metric: The key of the metric in metrics.jsonl.
        key: The x-axis: tokens, bytes or step.

    Returns:
        (x, y) of each logged value.
    """
    starts, logged_steps, points = phase_offsets(run, key), _read_logged_steps(run, key), []
    for line in run.metrics:
        phase, y = line.get("phase", ""), line.get(metric)
        if not isinstance(y, int | float) or not math.isfinite(y):
            continue
        x = line.get(key)
        if x is None and phase in logged_steps:  # an evaluation logs its step only: interpolate from the next logged step
            steps, amounts = logged_steps[phase]
            index = min(bisect_left(steps, line.get("step") or 0), len(steps) - 1)
            x = amounts[index] * (line.get("step") or 0) / max(steps[index], 1)
        if isinstance(x, int | float):
            points.append((x + starts.get(phase, 0), float(y)))
    return points


def _read_logged_steps(run: RunRecord, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """Read the logged steps of each phase, with the values of `key`."""
    logged_steps: dict[str, tuple[list[int], list[float]]] = {}
    for line in run.metrics:
        if isinstance(line.get(key), int | float) and "loss" in line:
            steps, amounts = logged_steps.setdefault(line.get("phase", ""), ([], []))
            steps.append(line["step"])
            amounts.append(line[key])
    return logged_steps


def thin_curve(name: str, points: Sequence[tuple[float, float]], style_index: int, max_points: int) -> Curve:
    """Thin points to a curve of means and extremes.

    Args:
        name: The name of the curve.
        points: Its (x, y) values.
        style_index: The number of its style.
        max_points: The number of points that it may have.
    """
    if len(points) <= max_points:
        return Curve(name, [x for x, _ in points], [y for _, y in points], style_index=style_index)
    size = points_per_group(len(points), max_points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    ys = [[y for _, y in each] for each in groups]
    xs = [sum(x for x, _ in each) / len(each) for each in groups]
    return Curve(name, xs, [sum(y) / len(y) for y in ys], low=list(map(min, ys)), high=list(map(max, ys)), style_index=style_index)


def points_per_group(count: int, max_points: int) -> int:
    """Return how many of `count` values become one point."""
    return math.ceil(count / max_points)


def plot_logged_metrics(runs: Sequence[RunRecord], key: str) -> list[tuple[Html, str]]:
    """Plot each logged metric, all runs in the same plot.

    Returns:
        The plots with their captions.
    """
    max_points = max(MAX_POINTS_PER_PLOT // max(len(runs), 1), MIN_POINTS_PER_CURVE)
    figures = []
    for metric in LOGGED_METRICS:
        if metric.key == "train_bpb" and len(runs) == 1:
            continue  # it has the shape of the loss, and serves to compare tokenizers
        series = {run.name: [(x, y / metric.divisor) for x, y in read_points(run, metric.key, key)] for run in runs}
        longest = max(map(len, series.values()), default=0)
        thinned = [thin_curve(name, points, index, max_points) for index, (name, points) in enumerate(series.items())]
        frame = PlotFrame(
            metric.title, X_LABELS[key], metric.unit, phase_borders(runs[0], key) if len(runs) == 1 else (), metric.key in METRICS_FROM_ZERO
        )
        figures.append(
            (plot_curves(frame, thinned), THINNED_NOTE.format(points_per_group(longest, max_points)) + "." if longest > max_points else "")
        )
    return figures


def build_bpb_curves(runs: Sequence[RunRecord], dataset: str, key: str) -> list[Curve]:
    """Build each run's curve of bits per byte.

    They have the values before the first step, during training and after each phase.
    """
    series = []
    for index, run in enumerate(runs):
        phase_starts, bits_per_byte = phase_offsets(run, key), run.result.get("bpb", {})
        points = read_points(run, f"eval_{dataset}_bpb", key)
        start = bits_per_byte.get("new_vocabulary") or bits_per_byte.get("base") or {}
        if dataset in start:
            points.append((0.0, start[dataset]))
        for phase, result in run.result.get("phases", {}).items():
            if dataset in bits_per_byte.get(phase, {}):
                x = phase_starts.get(phase, 0) + (result.get("steps" if key == "step" else key) or 0)
                points.append((x, bits_per_byte[phase][dataset]))
        series.append(thin_curve(run.name, sorted(dict(points).items()), index, MAX_POINTS_PER_PLOT))
    return series


def restyle_curve(name: str, curve: Curve, style_index: int) -> Curve:
    """Copy a curve with another name and style."""
    return replace(curve, name=name, style_index=style_index)
