"""SVG plots in the colours of the page.

They are readable in light and dark themes, in print, without colour and by a screen reader.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from azrecipe.report.html import PLOT_ID_PREFIX, Html

TEXT_COLOUR = "#010203"  # replaced by the page's text colour in the SVG
MARKERS = "os^Dv*PX"
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
COLOURS = ("#3b75af", "#c8702a", "#4f8f4f", "#a04c8c", "#7a6a4f", "#b0413e", "#3b8f8e", "#888888")  # legible on white and on black
MARKERS_PER_CURVE = 9  # markers on a curve of many points
FIGURE_SIZE = (4.7, 3.3)  # inches; the text is readable on a phone


@dataclass(frozen=True)
class Point:
    """A measured value: its name, position and interval."""

    name: str
    x: float
    y: float
    interval: Sequence[float] | None


@dataclass(frozen=True)
class Curve:
    """A series of values over x.

    `low` and `high` are the extremes where a value is the mean of several.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style_index: int = 0


@dataclass(frozen=True)
class PlotFrame:
    """Title, axes and vertical lines of a plot.

    Attributes:
        title: The title.
        x_label: The label of the x-axis.
        y_label: The label of the y-axis.
        borders: Vertical lines: x and name.
        from_zero: Whether the y-axis starts at 0.
        long_labels: Whether the x-axis has long names, which are rotated.
    """

    title: str
    x_label: str
    y_label: str
    borders: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    long_labels: bool = False


def plot_over_log_x(title: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Html:
    """Plot points and their intervals over a logarithmic x-axis.

    Args:
        title: The title.
        series: The points of each series, by name.
        x_label: The label of the x-axis.
        y_label: The label of the y-axis.
    """

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for index, (name, points) in enumerate(series.items()):
            _draw_errorbars(axes, index, name, sorted(points, key=lambda point: point.x))
        _set_ticks(axes, sorted({point.x for points in series.values() for point in points}))

    description = "; ".join(
        f"{name}: " + ", ".join(f"{p.name} {p.y:.4g} at {p.x:,.0f}" for p in sorted(points, key=lambda p: p.x))
        for name, points in series.items()
    )
    return _render_svg(PlotFrame(title, x_label, y_label, long_labels=True), draw, description, len(series))


def plot_categories(frame: PlotFrame, names: Sequence[str], series: Mapping[str, Sequence[Point]]) -> Html:
    """Plot points over categories.

    A point's x is the index of its category in `names`.
    """

    def draw(axes: Any) -> None:
        for index, (name, points) in enumerate(series.items()):
            _draw_errorbars(axes, index, name, points)
        axes.set_xticks(range(len(names)), [_shorten(name) for name in names], rotation=20 if frame.long_labels else 0)

    description = "; ".join(f"{name}: " + ", ".join(f"{p.name} {p.y:.4g}" for p in points) for name, points in series.items())
    return _render_svg(frame, draw, description, len(series))


def plot_curves(frame: PlotFrame, series: Sequence[Curve]) -> Html:
    """Plot curves; empty where none has two values."""
    series = [curve for curve in series if curve.x]
    if all(len(curve.x) < 2 for curve in series):
        return Html("")

    def draw(axes: Any) -> None:
        from matplotlib.ticker import EngFormatter, FuncFormatter

        for curve in series:
            style = {"markersize": 4.5, "linewidth": 1.4, **_style(curve.style_index)}
            every = max(len(curve.x) // MARKERS_PER_CURVE, 1)
            axes.plot(curve.x, curve.y, label=_label(curve.name), markevery=(curve.style_index % every, every), **style)
            if curve.low and curve.high:
                axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if frame.from_zero:
            axes.set_ylim(0, 1.08 * max(y for curve in series for y in curve.high or curve.y) or 1)
        large = max(abs(y) for curve in series for y in curve.y) >= 10_000
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if large else FuncFormatter(lambda y, _: f"{y:.4g}"))
        _draw_borders(axes, frame.borders)

    description = "; ".join(
        f"{curve.name}: {curve.y[0]:.4g} at first, {curve.y[-1]:.4g} at last, "
        f"lowest {min(curve.low or curve.y):.4g}, highest {max(curve.high or curve.y):.4g}"
        for curve in series
    )
    names = ", ".join(name for _, name in frame.borders)
    return _render_svg(frame, draw, description + (f". Borders, in order: {names}" if names else ""), len(series))


def _draw_borders(axes: Any, borders: Sequence[tuple[float, str]]) -> None:
    """Draw vertical lines with names, or with numbers where names would overlap."""
    if not borders:
        return
    low, high = axes.get_xlim()
    ends = [*(x for x, _ in borders[1:]), high]
    is_tight = any(end - x < 0.09 * len(name) / 4 * (high - low) for (x, name), end in zip(borders, ends, strict=True))
    for number, (x, name) in enumerate(borders, 1):
        axes.axvline(x, color=TEXT_COLOUR, alpha=0.6, linewidth=0.8, linestyle=":")
        label = str(number) if is_tight else name
        axes.annotate(label, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", fontsize=8)


def _render_svg(frame: PlotFrame, draw: Callable[[Any], None], description: str, num_series: int) -> Html:
    """Render a plot as <svg> with title and description.

    Args:
        frame: Title, axes and vertical lines.
        draw: Draws the values into matplotlib axes.
        description: The values in words, for a screen reader.
        num_series: The number of series; several get a legend.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT_COLOUR)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "azrecipe", "font.family": "sans-serif", "font.size": 10, "text.parse_math": False}
    with mpl.rc_context({**settings, **ink}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser has the glyphs that matplotlib's font lacks
        figure = Figure(figsize=FIGURE_SIZE)  # fixed margins fit all our labels; a tight layout takes as long as the drawing
        figure.subplots_adjust(left=0.15, right=0.97, top=0.87 if frame.borders else 0.9, bottom=0.22 if frame.long_labels else 0.15)
        axes = figure.add_subplot()
        axes.set_title(frame.title, fontsize=11, pad=16 if frame.borders else None)
        axes.set_xlabel(frame.x_label)
        axes.set_ylabel(frame.y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        if num_series > 1:
            axes.legend(frameon=False, fontsize=9, handlelength=3.2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embed_svg(out.getvalue(), frame.title, description)


def _embed_svg(svg: str, title: str, description: str) -> Html:
    svg = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], count=2).replace(TEXT_COLOUR, "currentColor")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{PLOT_ID_PREFIX}{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{PLOT_ID_PREFIX}", svg)
    words = f'<title id="{PLOT_ID_PREFIX}title">{escape(title)}</title><desc id="{PLOT_ID_PREFIX}description">{escape(description)}</desc>'
    return Html(
        re.sub(
            r"<svg([^>]*)>", rf'<svg\1 role="img" aria-labelledby="{PLOT_ID_PREFIX}title {PLOT_ID_PREFIX}description">', svg, count=1
        ).replace(">", f">{words}", 1)
    )


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def _draw_errorbars(axes: Any, index: int, name: str, points: Sequence[Point]) -> None:
    errors = None
    if any(point.interval for point in points):
        ends = [point.interval or (point.y, point.y) for point in points]
        below = [max(point.y - low, 0) for point, (low, _) in zip(points, ends, strict=True)]
        above = [max(high - point.y, 0) for point, (_, high) in zip(points, ends, strict=True)]
        errors = [below, above]
    axes.errorbar([point.x for point in points], [point.y for point in points], yerr=errors, label=_label(name), capsize=3, **_style(index))


def _label(name: str) -> str:
    """Protect a legend name: matplotlib omits those that start with an underscore."""
    return f"\u200b{_shorten(name)}" if name.startswith("_") else _shorten(name)


def _shorten(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:29]}…"


def _set_ticks(axes: Any, values: Sequence[float]) -> None:
    """Set ticks at the measured sizes, without those that would overlap."""
    ticks: list[float] = []
    for value in values:
        if not ticks or value > 1.25 * ticks[-1]:
            ticks.append(value)
    axes.set_xticks(ticks, [f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.0f}" for value in ticks], rotation=45)
    axes.minorticks_off()
