"""The page that compares several runs.

Runs of one stage share plots and tables. The page also lists the recipe keys that differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from azrecipe.report import evaluate_section, history_section, recipe_section, sections, sft_section, training_curves
from azrecipe.report.html import Html, Section, join_html, render_figures, render_table, tag
from azrecipe.report.number_format import format_measure, format_number
from azrecipe.report.svg_plots import PlotFrame, plot_curves
from azrecipe.runs.reader import RunRecord


def build_sections(runs: Sequence[RunRecord], page: Path) -> Iterator[Section]:
    """Build the sections of a comparison.

    Args:
        runs: Runs of any stages.
        page: The file of the page, from which links to other pages start.
    """
    yield Section("Runs", _render_runs(runs, page))
    for stage in dict.fromkeys(run.stage for run in runs):
        group = [run for run in runs if run.stage == stage]
        yield Section(sections.stage_title(group[0]), Html(""), list(build_stage_sections(group)))
    yield history_section.build_environment_section(runs)


def build_stage_sections(runs: Sequence[RunRecord]) -> Iterator[Section]:
    """Build the sections of runs of one stage."""
    yield Section("Recipes", _render_differing_keys(runs))
    build = {"pretrain": _build_pretrain, "sft": _build_sft, "tokenizer": _build_tokenizer, "evaluate": _build_evaluate}.get(runs[0].stage)
    if build is not None:
        yield from build(runs)


def link_run_page(run: RunRecord, page: Path, words: str) -> Html:
    """Link to a run's page."""
    return tag("a", words, href=os.path.relpath(run.path / "report.html", page.parent))


def _render_runs(runs: Sequence[RunRecord], page: Path) -> Html:
    rows = []
    for run in runs:
        headline = [f"{key} {value}" for key, value in sections.collect_headline(run).items() if value][:2]
        times = history_section.collect_state(run)
        rows.append(
            [
                link_run_page(run, page, run.name),
                run.stage,
                run.state,
                times["started"],
                times["from first start to end"],
                "; ".join(headline),
            ]
        )
    return render_table("Each name is a link to the run's page", ["run", "stage", "state", "started", "took", "headline"], rows)


def _render_differing_keys(runs: Sequence[RunRecord]) -> Html:
    """Render the recipe keys whose values differ between runs."""
    recipes = [dict(_flatten(run.recipe)) for run in runs]
    if len(runs) < 2:
        return Html("")
    keys = [
        key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if len({recipe.get(key, "–") for recipe in recipes}) > 1
    ]
    if not keys:
        return tag("p", "Their recipes are the same.")
    rows = [[key, *(recipe.get(key, "–") for recipe in recipes)] for key in keys]
    return render_table("Keys of the recipes that differ", ["key", *(run.name for run in runs)], rows)


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, child in enumerate(value):
            yield from _flatten(child, f"{path}[{index}]")
    else:
        yield path, recipe_section.format_recipe_value(value)


def _build_pretrain(runs: Sequence[RunRecord]) -> Iterator[Section]:
    bits_per_byte = [run.result.get("bpb", {}) for run in runs]  # by phase, then by held-out set
    sets = list(dict.fromkeys(name for each in bits_per_byte for values in each.values() for name in values))
    for name in sets:
        points = list(dict.fromkeys(point for each in bits_per_byte for point in each if name in each[point]))
        rows = [
            [run.name, *(f"{each[point][name]:.3f}" if name in each.get(point, {}) else "–" for point in points)]
            for run, each in zip(runs, bits_per_byte, strict=True)
        ]
        heads = ["run", *(point.replace("new_vocabulary", "the new vocabulary") for point in points)]
        plot = plot_curves(
            PlotFrame(f"Bits per byte, {name}", training_curves.X_LABELS["bytes"], "bits per byte"),
            training_curves.build_bpb_curves(runs, name, "bytes"),
        )
        yield Section(
            f"Bits per byte on {name}",
            join_html([render_table("After each phase, lower is better", heads, rows), render_figures([(plot, "")])]),
        )
    note = "The x-axis is bytes of text. Bytes and bits per byte are comparable between tokenizers; a loss per token is not."
    yield Section("Curves", join_html([tag("p", note), render_figures(training_curves.plot_logged_metrics(runs, "bytes"))]))
    totals = [[sum(phase[key] for phase in run.result.get("phases", {}).values()) for key in ("steps", "tokens", "bytes")] for run in runs]
    rows = [
        [run.name, format_number(run.result.get("parameters")), format_number(run.result.get("vocab_size")), *map(format_number, total)]
        for run, total in zip(runs, totals, strict=True)
    ]
    heads = ["run", "parameters", "vocabulary", "steps", "tokens", "bytes read"]
    yield Section("What they read", render_table("Sums over the finished phases", heads, rows))


def _build_sft(runs: Sequence[RunRecord]) -> Iterator[Section]:
    figures = training_curves.plot_logged_metrics(runs, "step")
    yield Section("Curves", render_figures([*figures[:1], (sft_section.plot_held_out_loss(runs), ""), *figures[1:]]))
    rows = []
    for run in runs:
        losses, data = run.result.get("held_out_loss") or {}, run.result.get("data") or {}
        before_and_after = [f"{losses[key]:.3f}" if losses.get(key) is not None else "–" for key in ("before", "after")]
        rows.append([run.name, *before_and_after, format_number(data.get("train")), format_number(data.get("trained_tokens"))])
    yield Section(
        "Losses", render_table("Held-out conversations", ["run", "loss before", "loss after", "trained on", "tokens with a loss"], rows)
    )


def _build_tokenizer(runs: Sequence[RunRecord]) -> Iterator[Section]:
    sets = list(dict.fromkeys(name for run in runs for name in run.result.get("validation", {})))
    for name in sets:
        rows = [
            [
                f"{run.name}: {line['name']}",
                format_number(line["vocab_size"]),
                format_measure(line["fertility"][name]),
                format_measure(line["bytes_per_token"][name]),
            ]
            for run in runs
            for line in run.result.get("candidates", [])
            if name in line["fertility"]
        ]
        yield Section(
            f"On {name}", render_table("In brackets: 95 % intervals", ["candidate", "tokens", "tokens/word", "bytes/token"], rows)
        )


def _build_evaluate(runs: Sequence[RunRecord]) -> Iterator[Section]:
    models = {f"{run.name}: {name}": model for run in runs for name, model in run.result.get("models", {}).items()}
    yield from evaluate_section.build_model_sections(models)
