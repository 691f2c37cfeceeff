"""Knows how a page shows a pipeline: its steps at a glance, then each as its own page shows it; those of a matrix' cells together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from azrecipe.report import comparison_page, evaluate_section, history_section, matrix_section, recipe_section, sections
from azrecipe.report.html import Html, Part, joined, table, tag
from azrecipe.runs.reader import Run


def parts(pipeline: Run, page: Path) -> Iterator[Part]:
    """All that the page tells; `page` is where it will stand."""
    steps = pipeline.steps
    keys = list(dict.fromkeys(key for key, _, _ in steps))
    yield Part("Steps", joined([recipe_section.described(pipeline), _overview(pipeline, page)]))
    last = [run for key, cell, run in steps if run.stage == "evaluate" and cell is None][-1:]
    yield from (Part("What came of it", evaluate_section.measures(run.result.get("models", {}))) for run in last)
    yield from matrix_section.parts(pipeline)
    yield recipe_section.part(pipeline)
    for nth, key in enumerate(keys, 1):
        once = [run for step, cell, run in steps if step == key and cell is None]
        several = [run for step, cell, run in steps if step == key and cell is not None]
        for run in once:
            yield Part(f"{nth}. {sections.title(run)}: {key}", sections.summary(run), _of_step(run), f"step-{nth}")
        if several:
            ran = [run for run in several if run.recipe]
            body = tag("p", f"Runs once in each of {len(several)} cells; {len(ran)} of them have begun.")
            yield Part(f"{nth}. {sections.title(several[0])}: {key}, cell by cell", body, list(comparison_page.of_stage(ran)) if ran else (), "" if once else f"step-{nth}")  # fmt: skip
    yield history_section.environment([run for _, _, run in steps])


def _of_step(run: Run) -> Sequence[Part]:
    return sections.of_run(run) if run.recipe else [Part("", Html("Not run yet."))]


def _overview(pipeline: Run, page: Path) -> Html:
    rows = []
    numbers: dict[str, int] = {}
    for key, cell, run in pipeline.steps:
        nth = numbers.setdefault(key, len(numbers) + 1)
        name = f"{cell}: {key}" if cell else key
        told = [f"{name} {value}" for name, value in sections.headline(run).items() if value][:2]
        times = history_section.facts(run)
        own = comparison_page.link(run, page, "page") if (run.path / "report.html").exists() else "–"
        rows.append(
            [
                tag("a", name, href=f"#step-{nth}"),
                run.stage or "–",
                run.state,
                times["from first start to end"] or "–",
                "; ".join(told) or "–",
                own,
            ]
        )
    return table("In the order in which they run", ["step", "stage", "state", "took", "headline", "its own page"], rows)
