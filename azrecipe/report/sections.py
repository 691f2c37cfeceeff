"""The sections of a run's page, in order, for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from azrecipe.report import (
    estimate_section,
    evaluate_section,
    history_section,
    merge_section,
    pretrain_section,
    recipe_section,
    sft_section,
    tokenizer_section,
)
from azrecipe.report.html import Html, Section, join_html, render_definitions, render_details, render_facts
from azrecipe.runs.reader import RunRecord


class StageReport(NamedTuple):
    """How a page reports a stage."""

    title: str
    collect_headline: Callable[[RunRecord], Mapping[str, str]]
    build_sections: Callable[[RunRecord], Iterable[Section]]


STAGE_REPORTS: Mapping[str, StageReport] = {
    "tokenizer": StageReport("Tokenizers", tokenizer_section.collect_headline, tokenizer_section.build_sections),
    "pretrain": StageReport("Pretraining", pretrain_section.collect_headline, pretrain_section.build_sections),
    "sft": StageReport("Instruction tuning", sft_section.collect_headline, sft_section.build_sections),
    "merge": StageReport("Merging", merge_section.collect_headline, merge_section.build_sections),
    "evaluate": StageReport("Evaluation", evaluate_section.collect_headline, evaluate_section.build_sections),
}


def stage_title(run: RunRecord) -> str:
    """Return the title of a run's stage."""
    return STAGE_REPORTS[run.stage].title if run.stage in STAGE_REPORTS else "Run"


def collect_headline(run: RunRecord) -> Mapping[str, str]:
    """Collect a run's headline numbers, the most important one first."""
    return STAGE_REPORTS[run.stage].collect_headline(run) if run.stage in STAGE_REPORTS else {}


def render_summary(run: RunRecord) -> Html:
    """Render state, times, headline numbers and the reason of a failure."""
    return join_html(
        [
            recipe_section.render_description(run),
            render_facts({**collect_headline(run), **history_section.collect_state(run)}),
            history_section.render_message(run),
        ]
    )


def build_run_sections(run: RunRecord) -> list[Section]:
    """Build all sections of a run except its environment."""
    stage_sections = STAGE_REPORTS[run.stage].build_sections(run) if run.stage in STAGE_REPORTS else ()
    terms = render_details("Definitions of the measures", render_definitions(run.result.get("definitions", {})))
    return [
        recipe_section.build_section(run),
        *stage_sections,
        estimate_section.build_section(run),
        history_section.build_starts_section(run),
        Section("Definitions", terms),
    ]
