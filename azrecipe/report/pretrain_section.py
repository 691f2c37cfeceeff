"""Knows how a page shows a pretrain run: bits per byte before and after each phase, curves with the phases' borders, data, skipped steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from azrecipe.report import training_curves
from azrecipe.report.html import Html, Part, folded, joined, listing, plots, table, tag
from azrecipe.report.number_format import PERCENT, number
from azrecipe.report.svg_plots import Frame
from azrecipe.report.svg_plots import curves as drawn
from azrecipe.runs.reader import Run
from azrecipe.utils.console import duration

AXIS = "tokens"


def facts(run: Run) -> dict[str, str]:
    """The headline."""
    phases = run.result.get("phases", {})
    told = run.result.get("bpb", {})
    last = told.get(list(phases)[-1], {}) if phases else {}
    first = told.get("base") or told.get("new_vocabulary") or {}
    bpb = {f"bits per byte, {name}": f"{first[name]:.3f} → {last[name]:.3f}" if name in first else f"{last[name]:.3f}" for name in last}
    return {
        **bpb,
        "parameters": number(run.result.get("parameters")),
        "steps": number(sum(phase["steps"] for phase in phases.values())) if phases else "",
        "tokens read": number(sum(phase["tokens"] for phase in phases.values())) if phases else "",
        "bytes read": number(sum(phase["bytes"] for phase in phases.values())) if phases else "",
        **measured(run),
    }


def measured(run: Run) -> dict[str, str]:
    """Speed and memory, from the logged steps."""
    speeds = [line["tokens_per_second"] for line in run.metrics if line.get("tokens_per_second")]
    memory = [line["peak_memory_bytes"] for line in run.metrics if line.get("peak_memory_bytes")]
    return {
        "tokens/s, median": f"{statistics.median(speeds):,.0f}" if speeds else "",
        "peak memory a process": f"{max(memory) / 1e9:.2f} GB" if memory else "",
    }


def parts(run: Run) -> Iterator[Part]:
    """What happened in training."""
    result = run.result
    told = result.get("bpb", {})
    sets = list(dict.fromkeys(name for values in told.values() for name in values))
    yield Part("Bits per byte", joined([_bpb(result, sets), _vocabulary(result.get("vocabulary"))]))
    found = training_curves.logged([run], AXIS)
    yield Part("Curves", joined([plots([*found[:1], _over_training(run, sets), *found[1:]]), tag("p", _axis(run))]))
    yield Part("Phases", _phases(result.get("phases", {})))
    yield Part("Data", _data(result.get("data", [])))
    yield Part("Steps left out", _skipped(run))


def _over_training(run: Run, sets: Sequence[str]) -> tuple[Html, str]:
    found = [training_curves.named(name, line, nth) for nth, name in enumerate(sets) for line in training_curves.bpb([run], name, AXIS)]
    changed = "new_vocabulary" in run.result.get("bpb", {})
    frame = Frame("Bits per byte of held-out text", training_curves.X[AXIS], "bits per byte", training_curves.borders(run, AXIS))
    return drawn(frame, found), "It begins with the new vocabulary; the base stands in the table." if changed else ""


def _axis(run: Run) -> str:
    batch, length = run.recipe.get("training", {}).get("global_batch_size"), run.recipe.get("data", {}).get("max_length")
    several = len(run.result.get("phases", {})) > 1
    borders = " Dotted upright lines: where a phase begins, by name or by its number among the phases below." if several else ""
    return f"A step is {batch:,} sequences of up to {length:,} tokens.{borders}" if batch and length else borders


def _bpb(result: Mapping[str, Any], sets: Sequence[str]) -> Html:
    rows: list[list[str]] = []
    before: Mapping[str, float] = {}
    for after, values in result.get("bpb", {}).items():
        phase = result.get("phases", {}).get(after, {})
        cells = []
        for name in sets:
            change = f" ({values[name] - before[name]:+.3f})" if name in before and name in values else ""
            cells.append(f"{values[name]:.3f}{change}" if name in values else "–")
        rows.append([after.replace("new_vocabulary", "the new vocabulary"), *cells, number(phase.get("steps")), number(phase.get("bytes"))])
        before = values
    caption = "Bits per byte of held-out text, lower is better; in brackets the change from the row above"
    return table(caption, ["after", *sets, "steps", "bytes read"], rows)


def _vocabulary(told: Mapping[str, Any] | None) -> Html:
    if not told:
        return Html("")
    return tag(
        "p",
        f"The vocabulary was changed from {told['old_size']:,} to {told['new_size']:,} tokens: {told['copied']:,} kept their embeddings, "
        f"{told['composed']:,} were composed ({told['method']}), {told['fallback']:,} could not be composed.",
    )


def _phases(phases: Mapping[str, Mapping[str, Any]]) -> Html:
    resumed = any(told.get("resumed_from") is not None for told in phases.values())
    rows = [
        [name, number(told.get("trainable_parameters")), f"{told['learning_rate']:.3g}", number(told["steps"]), number(told["tokens"]),
         number(told["bytes"]), f"{told['fill']:{PERCENT}}" if "fill" in told else "–",
         f"{told['last_loss']:.3f}" if told.get("last_loss") is not None else "–", duration(told["seconds"]),
         *([number(told.get("resumed_from"))] if resumed else [])]
        for name, told in phases.items()
    ]  # fmt: skip
    heads = ["phase", "trainable parameters", "learning rate", "steps", "tokens", "bytes", "sequences filled", "last loss", "time"]
    since = "; the time is that since the last resume" if resumed else ""
    return table(f"What each phase did{since}", heads + (["resumed from step"] if resumed else []), rows)


def _data(sources: Sequence[Mapping[str, Any]]) -> Html:
    rows = [
        [told["source"], number(told["documents"]), number(told["bytes"]), number(told["tokens"]), f"{told['share']:{PERCENT}}",
         f"{told['epochs']:.2f}", _left_out(told)]
        for told in sources
    ]  # fmt: skip
    heads = ["source", "documents", "bytes", "tokens", "share of the text", "epochs", "documents left out"]
    details = [
        folded(f"{key} in {told['source']}", listing(told[key])) for told in sources for key in ("cleaned", "duplicates") if told.get(key)
    ]
    return joined([table("What was read", heads, rows), *details])


def _left_out(told: Mapping[str, Any]) -> str:
    cleaned, repeated = told.get("cleaned") or {}, told.get("duplicates") or {}
    found = {"held out": told.get("held_out_left_out", 0), "clean-up": cleaned.get("dropped_documents", 0), **cleaned.get("filtered", {}),
             "duplicates": repeated.get("exact", 0), "near duplicates": repeated.get("near", 0), "near held-out ones": repeated.get("near_held_out", 0)}  # fmt: skip
    return ", ".join(f"{count:,} {reason}" for reason, count in found.items() if count) or "none"


def _skipped(run: Run) -> Html:
    rows = [
        [str(line.get("phase")), number(line.get("step")), str(line.get("reason")), ", ".join(_sources(line))]
        for line in run.bad_batches
    ]  # fmt: skip
    return table("Steps whose loss or gradient was bad", ["phase", "step", "what was wrong", "sources of the documents in it"], rows)


def _sources(line: Mapping[str, Any]) -> list[str]:
    return sorted(
        {str(document.get("source")) for batch in line.get("batches", []) for s in batch.get("sequences", []) for document in s.get("documents", [])}
    )  # fmt: skip
