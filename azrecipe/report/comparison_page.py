"""Knows how several runs are shown against each other: those of a stage in the same plots and tables, and the keys that differ."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from azrecipe.report import evaluate_section, history_section, recipe_section, sections, sft_section, training_curves
from azrecipe.report.html import Html, Part, joined, plots, table, tag
from azrecipe.report.number_format import number, with_interval
from azrecipe.report.svg_plots import Frame
from azrecipe.report.svg_plots import curves as drawn
from azrecipe.runs.reader import Run


def parts(runs: Sequence[Run], page: Path) -> Iterator[Part]:
    """Runs of any stages; `page` is where the page will stand, for links to their own ones."""
    yield Part("Runs", _runs(runs, page))
    for stage in dict.fromkeys(run.stage for run in runs):
        group = [run for run in runs if run.stage == stage]
        yield Part(sections.title(group[0]), Html(""), list(of_stage(group)))
    yield history_section.environment(runs)


def of_stage(runs: Sequence[Run]) -> Iterator[Part]:
    """Runs of one stage."""
    yield Part("What was asked", _differing(runs))
    shown = {"pretrain": _pretrain, "sft": _sft, "tokenizer": _tokenizer, "evaluate": _evaluate}.get(runs[0].stage)
    if shown is not None:
        yield from shown(runs)


def link(run: Run, page: Path, words: str) -> Html:
    """A link to a run's own page."""
    return tag("a", words, href=os.path.relpath(run.path / "report.html", page.parent))


def _runs(runs: Sequence[Run], page: Path) -> Html:
    rows = []
    for run in runs:
        told = [f"{key} {value}" for key, value in sections.headline(run).items() if value][:2]
        times = history_section.facts(run)
        rows.append([link(run, page, run.name), run.stage, run.state, times["started"], times["from first start to end"], "; ".join(told)])
    return table("Each run has a page of its own behind its name", ["run", "stage", "state", "started", "took", "headline"], rows)


def _differing(runs: Sequence[Run]) -> Html:
    """The keys of the resolved recipes whose values are not the same in all runs."""
    found = [dict(_leaves(run.recipe)) for run in runs]
    if len(runs) < 2:
        return Html("")
    keys = [key for key in dict.fromkeys(key for each in found for key in each) if len({each.get(key, "–") for each in found}) > 1]
    if not keys:
        return tag("p", "Their recipes are the same.")
    rows = [[key, *(each.get(key, "–") for each in found)] for key in keys]
    return table("Keys of the recipes that differ", ["key", *(run.name for run in runs)], rows)


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for nth, below in enumerate(value):
            yield from _leaves(below, f"{at}[{nth}]")
    else:
        yield at, recipe_section.shown(value)


def _pretrain(runs: Sequence[Run]) -> Iterator[Part]:
    told = [run.result.get("bpb", {}) for run in runs]
    sets = list(dict.fromkeys(name for each in told for values in each.values() for name in values))
    for name in sets:
        points = list(dict.fromkeys(point for each in told for point in each if name in each[point]))
        rows = [
            [run.name, *(f"{each[point][name]:.3f}" if name in each.get(point, {}) else "–" for point in points)]
            for run, each in zip(runs, told, strict=True)
        ]
        heads = ["run", *(point.replace("new_vocabulary", "the new vocabulary") for point in points)]
        line = drawn(Frame(f"Bits per byte, {name}", training_curves.X["bytes"], "bits per byte"), training_curves.bpb(runs, name, "bytes"))
        yield Part(f"Bits per byte on {name}", joined([table("After each phase, lower is better", heads, rows), plots([(line, "")])]))
    said = "Over bytes of text, which mean the same for every tokenizer; so do bits per byte, and a loss a token does not."
    yield Part("Curves", joined([tag("p", said), plots(training_curves.logged(runs, "bytes"))]))
    totals = [[sum(phase[key] for phase in run.result.get("phases", {}).values()) for key in ("steps", "tokens", "bytes")] for run in runs]
    rows = [
        [run.name, number(run.result.get("parameters")), number(run.result.get("vocab_size")), *map(number, total)]
        for run, total in zip(runs, totals, strict=True)
    ]
    heads = ["run", "parameters", "vocabulary", "steps", "tokens", "bytes read"]
    yield Part("What they read", table("Sums over the phases that are finished", heads, rows))


def _sft(runs: Sequence[Run]) -> Iterator[Part]:
    found = training_curves.logged(runs, "step")
    yield Part("Curves", plots([*found[:1], (sft_section.held_out(runs), ""), *found[1:]]))
    rows = []
    for run in runs:
        losses, data = run.result.get("held_out_loss") or {}, run.result.get("data") or {}
        both = [f"{losses[key]:.3f}" if losses.get(key) is not None else "–" for key in ("before", "after")]
        rows.append([run.name, *both, number(data.get("train")), number(data.get("trained_tokens"))])
    yield Part("Losses", table("Held-out conversations", ["run", "loss before", "loss after", "trained on", "tokens with a loss"], rows))


def _tokenizer(runs: Sequence[Run]) -> Iterator[Part]:
    sets = list(dict.fromkeys(name for run in runs for name in run.result.get("validation", {})))
    for name in sets:
        rows = [
            [f"{run.name}: {line['name']}", number(line["vocab_size"]), with_interval(line["fertility"][name]), with_interval(line["bytes_per_token"][name])]
            for run in runs for line in run.result.get("candidates", []) if name in line["fertility"]
        ]  # fmt: skip
        yield Part(f"On {name}", table("In brackets: 95 % intervals", ["candidate", "tokens", "tokens/word", "bytes/token"], rows))


def _evaluate(runs: Sequence[Run]) -> Iterator[Part]:
    models = {f"{run.name}: {name}": told for run in runs for name, told in run.result.get("models", {}).items()}
    yield from evaluate_section.of_models(models)
