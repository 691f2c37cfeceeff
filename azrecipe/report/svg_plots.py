"""Plots as SVG that takes the page's own colours: readable in light and dark, in print, without colour, and by a screen reader."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from azrecipe.report.html import OWN, Html

INK = "#010203"  # stands for the page's text colour until the SVG is in the page
MARKERS = "os^Dv*PX"
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
COLOURS = ("#3b75af", "#c8702a", "#4f8f4f", "#a04c8c", "#7a6a4f", "#b0413e", "#3b8f8e", "#888888")  # all legible on white and on black
MARKED = 9  # markers on a curve of many points
SIZE = (4.7, 3.3)  # inches: on a phone, a screen wide, its text can still be read


@dataclass(frozen=True)
class Point:
    """One measured value: a name, where it stands, and its interval."""

    name: str
    x: float
    y: float
    interval: Sequence[float] | None


@dataclass(frozen=True)
class Curve:
    """A series of values over x. `low` and `high` are what lies behind a value that stands for several; `nth` is its style."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    nth: int = 0


@dataclass(frozen=True)
class Frame:
    """What stands around a plot's values; borders are upright lines with names. With `zero` the values are seen from 0 up.

    `leaning` leaves room for long names below.
    """

    title: str
    x: str
    y: str
    borders: Sequence[tuple[float, str]] = ()
    zero: bool = False
    leaning: bool = False


def against(title: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Html:
    """Series of points over a logarithmic x, with their intervals."""

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for nth, (name, points) in enumerate(series.items()):
            _errorbars(axes, nth, name, sorted(points, key=lambda point: point.x))
        _ticks(axes, sorted({point.x for points in series.values() for point in points}))

    told = "; ".join(
        f"{name}: " + ", ".join(f"{p.name} {p.y:.4g} at {p.x:,.0f}" for p in sorted(points, key=lambda p: p.x))
        for name, points in series.items()
    )
    return _svg(Frame(title, x_label, y_label, leaning=True), draw, told, len(series))


def steps(frame: Frame, names: Sequence[str], series: Mapping[str, Sequence[Point]]) -> Html:
    """Series of points over named things, one after the other; a point's x is its number among them."""

    def draw(axes: Any) -> None:
        for nth, (name, points) in enumerate(series.items()):
            _errorbars(axes, nth, name, points)
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=20 if frame.leaning else 0)

    told = "; ".join(f"{name}: " + ", ".join(f"{p.name} {p.y:.4g}" for p in points) for name, points in series.items())
    return _svg(frame, draw, told, len(series))


def curves(frame: Frame, found: Sequence[Curve]) -> Html:
    """Curves in one plot; nothing where none has two values."""
    found = [curve for curve in found if curve.x]
    if all(len(curve.x) < 2 for curve in found):
        return Html("")

    def draw(axes: Any) -> None:
        from matplotlib.ticker import EngFormatter, FuncFormatter

        for curve in found:
            style = {"markersize": 4.5, "linewidth": 1.4, **_style(curve.nth)}
            every = max(len(curve.x) // MARKED, 1)
            axes.plot(curve.x, curve.y, label=_label(curve.name), markevery=(curve.nth % every, every), **style)
            if curve.low and curve.high:
                axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.2, linewidth=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if frame.zero:
            axes.set_ylim(0, 1.08 * max(y for curve in found for y in curve.high or curve.y) or 1)
        large = max(abs(y) for curve in found for y in curve.y) >= 10_000
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if large else FuncFormatter(lambda y, _: f"{y:.4g}"))
        _borders(axes, frame.borders)

    told = "; ".join(
        f"{c.name}: {c.y[0]:.4g} at first, {c.y[-1]:.4g} at last, lowest {min(c.low or c.y):.4g}, highest {max(c.high or c.y):.4g}"
        for c in found
    )
    names = ", ".join(name for _, name in frame.borders)
    return _svg(frame, draw, told + (f". Borders, in order: {names}" if names else ""), len(found))


def _borders(axes: Any, borders: Sequence[tuple[float, str]]) -> None:
    """Upright lines with their names above them, or numbers where names would stand on each other."""
    if not borders:
        return
    low, high = axes.get_xlim()
    ends = [*(x for x, _ in borders[1:]), high]
    tight = any(end - x < 0.09 * len(name) / 4 * (high - low) for (x, name), end in zip(borders, ends, strict=True))
    for nth, (x, name) in enumerate(borders, 1):
        axes.axvline(x, color=INK, alpha=0.6, linewidth=0.8, linestyle=":")
        said = str(nth) if tight else name
        axes.annotate(said, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", fontsize=8)


def _svg(frame: Frame, draw: Callable[[Any], None], told: str, series: int) -> Html:
    """One plot as an <svg> element with a title and a description in words."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "azrecipe", "font.family": "sans-serif", "font.size": 10, "text.parse_math": False}
    with mpl.rc_context({**settings, **ink}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's own font lacks is the browser's to find
        figure = Figure(figsize=SIZE)  # margins that fit any of our labels: to find the tightest ones takes as long as to draw
        figure.subplots_adjust(left=0.15, right=0.97, top=0.87 if frame.borders else 0.9, bottom=0.22 if frame.leaning else 0.15)
        axes = figure.add_subplot()
        axes.set_title(frame.title, fontsize=11, pad=16 if frame.borders else None)
        axes.set_xlabel(frame.x)
        axes.set_ylabel(frame.y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        draw(axes)
        if series > 1:
            axes.legend(frameon=False, fontsize=9, handlelength=3.2)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embedded(out.getvalue(), frame.title, told)


def _embedded(svg: str, title: str, told: str) -> Html:
    svg = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", svg[svg.index("<svg") :], count=2).replace(INK, "currentColor")
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{OWN}{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{OWN}", svg)
    words = f'<title id="{OWN}title">{escape(title)}</title><desc id="{OWN}told">{escape(told)}</desc>'
    return Html(
        re.sub(r"<svg([^>]*)>", rf'<svg\1 role="img" aria-labelledby="{OWN}title {OWN}told">', svg, count=1).replace(">", f">{words}", 1)
    )


def _style(nth: int) -> dict[str, Any]:
    return {"color": COLOURS[nth % len(COLOURS)], "marker": MARKERS[nth % len(MARKERS)], "linestyle": LINES[nth % len(LINES)]}


def _errorbars(axes: Any, nth: int, name: str, points: Sequence[Point]) -> None:
    errors = None
    if any(p.interval for p in points):
        ends = [p.interval or (p.y, p.y) for p in points]
        errors = [[max(p.y - low, 0) for p, (low, _) in zip(points, ends, strict=True)], [max(high - p.y, 0) for p, (_, high) in zip(points, ends, strict=True)]]  # fmt: skip
    axes.errorbar([p.x for p in points], [p.y for p in points], yerr=errors, label=_label(name), capsize=3, **_style(nth))


def _label(name: str) -> str:
    """A name as a legend takes it: matplotlib leaves out those that begin with an underscore."""
    return f"\u200b{_short(name)}" if name.startswith("_") else _short(name)


def _short(name: str) -> str:
    return name if len(name) <= 30 else f"{name[:29]}…"


def _ticks(axes: Any, values: Sequence[float]) -> None:
    """The sizes that were measured, those left out that would stand on one another."""
    shown: list[float] = []
    for value in values:
        if not shown or value > 1.25 * shown[-1]:
            shown.append(value)
    axes.set_xticks(shown, [f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.0f}" for value in shown], rotation=45)
    axes.minorticks_off()
