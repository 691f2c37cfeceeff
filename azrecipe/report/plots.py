"""Plots as SVG that takes the page's own colours: readable in light and dark, in print, and without colour."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INK = "#010203"  # stands for the page's text colour until the SVG is in the page
MARKERS = "os^Dv*PX"
LINES = ("-", "--", "-.", ":")
COLOURS = ("#3b75af", "#c8702a", "#4f8f4f", "#a04c8c", "#7a6a4f", "#b0413e", "#4aa3a2", "#888888")  # all legible on white and on black


@dataclass(frozen=True)
class Point:
    """One measured value: a name, where it stands, and its interval."""

    name: str
    x: float
    y: float
    interval: Sequence[float] | None


def against(panels: Mapping[str, Mapping[str, Sequence[Point]]], x_label: str, y_label: str) -> str:
    """Panels side by side, each with series of points over a logarithmic x; returns an <svg> element."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "azrecipe", "font.family": "sans-serif", "font.size": 10, **colours}):
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        for nth, (title, series) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, len(panels), nth)
            axes.set_title(title)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.set_xscale("log")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            for i, (name, points) in enumerate(series.items()):
                _draw(axes, i, name, sorted(points, key=lambda point: point.x))
            _ticks(axes, sorted({point.x for points in series.values() for point in points}))
            if nth == 1:
                axes.legend(frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    return re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], count=2).replace(INK, "currentColor")


def _draw(axes: Any, nth: int, name: str, points: Sequence[Point]) -> None:
    style = {"color": COLOURS[nth % len(COLOURS)], "marker": MARKERS[nth % len(MARKERS)], "linestyle": LINES[nth % len(LINES)]}
    errors = [
        [max(p.y - p.interval[0], 0) if p.interval else 0 for p in points],
        [max(p.interval[1] - p.y, 0) if p.interval else 0 for p in points],
    ]
    axes.errorbar([p.x for p in points], [p.y for p in points], yerr=errors, label=name, capsize=3, **style)


def _ticks(axes: Any, values: Sequence[float]) -> None:
    """The sizes that were measured, those left out that would stand on one another."""
    shown: list[float] = []
    for value in values:
        if not shown or value > 1.25 * shown[-1]:
            shown.append(value)
    axes.set_xticks(shown, [f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.0f}" for value in shown], rotation=45)
    axes.minorticks_off()
