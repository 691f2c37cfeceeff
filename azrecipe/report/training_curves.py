"""Knows what is drawn of metrics.jsonl: which curves there are, over what, and how a long one is thinned."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from azrecipe.report.html import Html
from azrecipe.report.svg_plots import Curve, Frame, curves
from azrecipe.runs.reader import Run

MOST = 400  # points of a plot's curves, shared by the curves of several runs
LEAST = 80  # points of one curve, however many there are
X = {"tokens": "tokens read", "bytes": "bytes of text read", "step": "step"}
# What each training logs: key of a line, title, unit, and what a value is divided by.
LOGGED: Sequence[tuple[str, str, str, float]] = (
    ("loss", "Training loss", "nats a token", 1),
    ("train_bpb", "Training text", "bits per byte", 1),
    ("learning_rate", "Learning rate", "", 1),
    ("tokens_per_second", "Speed", "tokens/s", 1),
    ("peak_memory_bytes", "Peak memory", "GB", 1e9),
)
FROM_ZERO = ("tokens_per_second", "peak_memory_bytes")
THINNED = "A point stands for up to {:,} logged steps: their mean, and the band from the lowest to the highest"


def offsets(run: Run, key: str) -> dict[str, float]:
    """How much of `key` (tokens, bytes or step) a run had done when each phase began; a line counts from its phase's start."""
    finished = run.result.get("phases", {})
    totals: dict[str, float] = {}
    for line in run.metrics:
        totals[line.get("phase", "")] = max(totals.get(line.get("phase", ""), 0), line.get(key) or 0)
    for phase, told in finished.items():
        totals[phase] = told.get("steps" if key == "step" else key) or totals.get(phase, 0)
    return dict(zip(totals, accumulate(totals.values(), initial=0), strict=False))


def borders(run: Run, key: str) -> list[tuple[float, str]]:
    """Where each phase begins, for a run that has several."""
    found = offsets(run, key)
    return [(x, name) for name, x in found.items()] if len(found) > 1 else []


def values(run: Run, wanted: str, key: str) -> list[tuple[float, float]]:
    """Every logged value of one kind, with how much of `key` had been read."""
    before, read, found = offsets(run, key), _read(run, key), []
    for line in run.metrics:
        phase, y = line.get("phase", ""), line.get(wanted)
        if not isinstance(y, int | float) or not math.isfinite(y):
            continue
        x = line.get(key)
        if x is None and phase in read:  # a measurement, which knows its step only: as much as at the next logged one, in proportion
            steps, amounts = read[phase]
            nth = min(bisect_left(steps, line.get("step") or 0), len(steps) - 1)
            x = amounts[nth] * (line.get("step") or 0) / max(steps[nth], 1)
        if isinstance(x, int | float):
            found.append((x + before.get(phase, 0), float(y)))
    return found


def _read(run: Run, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """The logged steps of each phase, and how much of `key` had been read at them."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in run.metrics:
        if isinstance(line.get(key), int | float) and "loss" in line:
            steps, amounts = found.setdefault(line.get("phase", ""), ([], []))
            steps.append(line["step"])
            amounts.append(line[key])
    return found


def curve(name: str, found: Sequence[tuple[float, float]], nth: int, most: int) -> Curve:
    """Values as a curve of at most `most` points: means of neighbours with the lowest and the highest of them."""
    if len(found) <= most:
        return Curve(name, [x for x, _ in found], [y for _, y in found], nth=nth)
    size = group(len(found), most)
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    ys = [[y for _, y in each] for each in groups]
    return Curve(
        name, [sum(x for x, _ in each) / len(each) for each in groups], [sum(y) / len(y) for y in ys], list(map(min, ys)), list(map(max, ys)), nth
    )  # fmt: skip


def group(count: int, most: int) -> int:
    """How many neighbours become one point."""
    return math.ceil(count / most)


def logged(runs: Sequence[Run], key: str) -> list[tuple[Html, str]]:
    """A plot for each thing that training logs, all runs in the same plots, with what a reader must know of it."""
    most = max(MOST // max(len(runs), 1), LEAST)
    found = []
    for wanted, title, unit, divisor in LOGGED:
        if wanted == "train_bpb" and len(runs) == 1:
            continue  # has the shape of the loss, and is for comparing tokenizers
        series = {run.name: [(x, y / divisor) for x, y in values(run, wanted, key)] for run in runs}
        longest = max(map(len, series.values()), default=0)
        drawn = [curve(name, points, nth, most) for nth, (name, points) in enumerate(series.items())]
        frame = Frame(title, X[key], unit, borders(runs[0], key) if len(runs) == 1 else (), wanted in FROM_ZERO)
        found.append((curves(frame, drawn), THINNED.format(group(longest, most)) + "." if longest > most else ""))
    return found


def bpb(runs: Sequence[Run], dataset: str, key: str) -> list[Curve]:
    """Bits per byte on one validation set over training, of each run: before the first step, measured on the way, after each phase."""
    found = []
    for nth, run in enumerate(runs):
        before, told = offsets(run, key), run.result.get("bpb", {})
        points = values(run, f"eval_{dataset}_bpb", key)
        start = told.get("new_vocabulary") or told.get("base") or {}
        if dataset in start:
            points.append((0.0, start[dataset]))
        for phase, done in run.result.get("phases", {}).items():
            if dataset in told.get(phase, {}):
                points.append((before.get(phase, 0) + (done.get("steps" if key == "step" else key) or 0), told[phase][dataset]))
        found.append(curve(run.name, sorted(dict(points).items()), nth, MOST))
    return found


def named(name: str, found: Curve, nth: int) -> Curve:
    """The same curve under another name and in another style."""
    return replace(found, name=name, nth=nth)
