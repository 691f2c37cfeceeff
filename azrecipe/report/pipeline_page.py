"""The page of a pipeline: overview, then each step.

The cells of a matrix share the section of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from azrecipe.report import comparison_page, evaluate_section, history_section, matrix_section, recipe_section, sections
from azrecipe.report.html import Html, Section, join_html, render_table, tag
from azrecipe.runs.reader import RunRecord


def build_sections(pipeline: RunRecord, page: Path) -> Iterator[Section]:
    """Build the sections of a pipeline.

    Args:
        pipeline: The pipeline.
        page: The file of the page, from which links to other pages start.
    """
    steps = pipeline.steps
    keys = list(dict.fromkeys(key for key, _, _ in steps))
    yield Section("Steps", join_html([recipe_section.render_description(pipeline), _render_overview(pipeline, page)]))
    last = [run for key, cell, run in steps if run.stage == "evaluate" and cell is None][-1:]
    yield from (Section("Result", evaluate_section.render_measures(run.result.get("models", {}))) for run in last)
    yield from matrix_section.build_sections(pipeline)
    yield recipe_section.build_section(pipeline)
    for number, key in enumerate(keys, 1):
        single = [run for step, cell, run in steps if step == key and cell is None]
        cells = [run for step, cell, run in steps if step == key and cell is not None]
        for run in single:
            yield Section(
                f"{number}. {sections.stage_title(run)}: {key}", sections.render_summary(run), _build_step_sections(run), f"step-{number}"
            )
        if cells:
            started = [run for run in cells if run.recipe]
            title = f"{number}. {sections.stage_title(cells[0])}: {key}, cell by cell"
            body = tag("p", f"Runs once in each of {len(cells)} cells; {len(started)} of them have started.")
            yield Section(
                title,
                body,
                list(comparison_page.build_stage_sections(started)) if started else (),
                "" if single else f"step-{number}",
            )
    yield history_section.build_environment_section([run for _, _, run in steps])


def _build_step_sections(run: RunRecord) -> Sequence[Section]:
    return sections.build_run_sections(run) if run.recipe else [Section("", Html("Not run yet."))]


def _render_overview(pipeline: RunRecord, page: Path) -> Html:
    rows = []
    numbers: dict[str, int] = {}
    for key, cell, run in pipeline.steps:
        number = numbers.setdefault(key, len(numbers) + 1)
        name = f"{cell}: {key}" if cell else key
        headline = [f"{label} {value}" for label, value in sections.collect_headline(run).items() if value][:2]
        times = history_section.collect_state(run)
        page_link = comparison_page.link_run_page(run, page, "page") if (run.path / "report.html").exists() else "–"
        rows.append(
            [
                tag("a", name, href=f"#step-{number}"),
                run.stage or "–",
                run.state,
                times["from first start to end"] or "–",
                "; ".join(headline) or "–",
                page_link,
            ]
        )
    return render_table("In the order in which they run", ["step", "stage", "state", "took", "headline", "page"], rows)
