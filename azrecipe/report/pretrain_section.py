"""The report of a pretrain run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report import training_curves
from azrecipe.report.html import Html, Section, join_html, render_details, render_figures, render_json, render_table, tag
from azrecipe.report.number_format import PERCENT, format_number
from azrecipe.report.svg_plots import PlotFrame, plot_curves
from azrecipe.runs.reader import RunRecord
from azrecipe.utils.console import format_duration

X_AXIS = "tokens"


def collect_headline(run: RunRecord) -> dict[str, str]:
    """Collect the headline."""
    phases = run.result.get("phases", {})
    bpb = run.result.get("bpb", {})  # by phase, then by held-out set
    last = bpb.get(list(phases)[-1], {}) if phases else {}
    first = bpb.get("base") or bpb.get("new_vocabulary") or {}
    changes = {f"bits per byte, {name}": f"{first[name]:.3f} → {last[name]:.3f}" if name in first else f"{last[name]:.3f}" for name in last}
    return {
        **changes,
        "parameters": format_number(run.result.get("parameters")),
        "steps": format_number(sum(phase["steps"] for phase in phases.values())) if phases else "",
        "tokens read": format_number(sum(phase["tokens"] for phase in phases.values())) if phases else "",
        "bytes read": format_number(sum(phase["bytes"] for phase in phases.values())) if phases else "",
        **measure_speed_and_memory(run),
    }


def measure_speed_and_memory(run: RunRecord) -> dict[str, str]:
    """Collect speed and memory from the logged steps."""
    speeds = [line["tokens_per_second"] for line in run.metrics if line.get("tokens_per_second")]
    memory = [line["peak_memory_bytes"] for line in run.metrics if line.get("peak_memory_bytes")]
    return {
        "tokens/s, median": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "peak memory per process": f"{max(memory) / 1e9:.2f} GB" if memory else "",
    }


def build_sections(run: RunRecord) -> Iterator[Section]:
    """Build the sections of a pretrain run."""
    result = run.result
    sets = list(dict.fromkeys(name for values in result.get("bpb", {}).values() for name in values))
    yield Section("Bits per byte", join_html([_render_bits_per_byte(result, sets), _describe_vocabulary(result.get("vocabulary"))]))
    figures = training_curves.plot_logged_metrics([run], X_AXIS)
    yield Section(
        "Curves", join_html([render_figures([*figures[:1], _plot_bits_per_byte(run, sets), *figures[1:]]), tag("p", _describe_axis(run))])
    )
    yield Section("Phases", _render_phases(result.get("phases", {})))
    yield Section("Data", _render_data(result.get("data", [])))
    yield Section("Skipped steps", _render_skipped_steps(run))


def _plot_bits_per_byte(run: RunRecord, sets: Sequence[str]) -> tuple[Html, str]:
    plotted = [
        training_curves.restyle_curve(name, curve, index)
        for index, name in enumerate(sets)
        for curve in training_curves.build_bpb_curves([run], name, X_AXIS)
    ]
    is_new_vocabulary = "new_vocabulary" in run.result.get("bpb", {})
    frame = PlotFrame(
        "Bits per byte of held-out text", training_curves.X_LABELS[X_AXIS], "bits per byte", training_curves.phase_borders(run, X_AXIS)
    )
    return plot_curves(frame, plotted), "It starts with the new vocabulary; the table has the base." if is_new_vocabulary else ""


def _describe_axis(run: RunRecord) -> str:
    batch, length = run.recipe.get("training", {}).get("global_batch_size"), run.recipe.get("data", {}).get("max_length")
    has_phases = len(run.result.get("phases", {})) > 1
    borders = " Dotted lines: the start of a phase, by name or by its number in the table below." if has_phases else ""
    return f"A step is {batch:,} sequences of up to {length:,} tokens.{borders}" if batch and length else borders


def _render_bits_per_byte(result: Mapping[str, Any], sets: Sequence[str]) -> Html:
    rows: list[list[str]] = []
    before: Mapping[str, float] = {}
    for after, values in result.get("bpb", {}).items():
        phase = result.get("phases", {}).get(after, {})
        cells = []
        for name in sets:
            change = f" ({values[name] - before[name]:+.3f})" if name in before and name in values else ""
            cells.append(f"{values[name]:.3f}{change}" if name in values else "–")
        rows.append(
            [
                after.replace("new_vocabulary", "the new vocabulary"),
                *cells,
                format_number(phase.get("steps")),
                format_number(phase.get("bytes")),
            ]
        )
        before = values
    caption = "Bits per byte of held-out text, lower is better; in brackets the change from the row above"
    return render_table(caption, ["after", *sets, "steps", "bytes read"], rows)


def _describe_vocabulary(swap: Mapping[str, Any] | None) -> Html:
    if not swap:
        return Html("")
    return tag(
        "p",
        f"The vocabulary was changed from {swap['old_size']:,} to {swap['new_size']:,} tokens: {swap['copied']:,} kept their embeddings, "
        f"{swap['composed']:,} were composed ({swap['method']}), {swap['fallback']:,} could not be composed.",
    )


def _render_phases(phases: Mapping[str, Mapping[str, Any]]) -> Html:
    resumed = any(phase.get("resumed_from") is not None for phase in phases.values())
    rows = [
        [
            name,
            format_number(phase.get("trainable_parameters")),
            f"{phase['learning_rate']:.3g}",
            format_number(phase["steps"]),
            format_number(phase["tokens"]),
            format_number(phase["bytes"]),
            f"{phase['fill']:{PERCENT}}" if "fill" in phase else "–",
            f"{phase['last_loss']:.3f}" if phase.get("last_loss") is not None else "–",
            format_duration(phase["seconds"]),
            *([format_number(phase.get("resumed_from"))] if resumed else []),
        ]
        for name, phase in phases.items()
    ]
    heads = ["phase", "trainable parameters", "learning rate", "steps", "tokens", "bytes", "sequences filled", "last loss", "time"]
    note = "; the time is that since the last resume" if resumed else ""
    return render_table(f"Training phases{note}", heads + (["resumed from step"] if resumed else []), rows)


def _render_data(sources: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        [
            source["source"],
            format_number(source["documents"]),
            format_number(source["bytes"]),
            format_number(source["tokens"]),
            f"{source['share']:{PERCENT}}",
            f"{source['epochs']:.2f}",
            _describe_left_out(source),
        ]
        for source in sources
    ]
    heads = ["source", "documents", "bytes", "tokens", "share of the text", "epochs", "documents left out"]
    details = [
        render_details(f"{key} in {source['source']}", render_json(source[key]))
        for source in sources
        for key in ("cleaned", "duplicates")
        if source.get(key)
    ]
    return join_html([render_table("Training data", heads, rows), _render_phase_shares(sources), *details])


def _render_phase_shares(sources: Sequence[Mapping[str, Any]]) -> Html:
    """Render the shares by phase; nothing where they do not change."""
    if not sources or "phase_shares" not in sources[0]:
        return Html("")
    phases = list(sources[0]["phase_shares"])
    rows = [[source["source"], *(f"{source['phase_shares'][phase]:{PERCENT}}" for phase in phases)] for source in sources]
    return render_table("Share of each source in the text of a phase", ["source", *phases], rows)


def _describe_left_out(source: Mapping[str, Any]) -> str:
    cleaned, repeated = source.get("cleaned") or {}, source.get("duplicates") or {}
    counts = {
        "held out": source.get("held_out_left_out", 0),
        "clean-up": cleaned.get("dropped_documents", 0),
        **cleaned.get("filtered", {}),
        "duplicates": repeated.get("exact", 0),
        "near duplicates": repeated.get("near", 0),
        "near held-out documents": repeated.get("near_held_out", 0),
    }
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none"


def _render_skipped_steps(run: RunRecord) -> Html:
    rows = [
        [str(line.get("phase")), format_number(line.get("step")), str(line.get("reason")), ", ".join(_list_sources(line))]
        for line in run.bad_batches
    ]
    return render_table("Steps whose loss or gradient was bad", ["phase", "step", "problem", "sources of its documents"], rows)


def _list_sources(line: Mapping[str, Any]) -> list[str]:
    return sorted(
        {
            str(document.get("source"))
            for batch in line.get("batches", [])
            for sequence in batch.get("sequences", [])
            for document in sequence.get("documents", [])
        }
    )
