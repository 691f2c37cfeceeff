"""Knows which module shows which stage, and the order of what a page tells of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from azrecipe.report import (
    estimate_section,
    evaluate_section,
    history_section,
    pretrain_section,
    recipe_section,
    sft_section,
    tokenizer_section,
)
from azrecipe.report.html import Html, Part, definitions, facts, folded, joined
from azrecipe.runs.reader import Run

Facts = Callable[[Run], Mapping[str, str]]
Parts = Callable[[Run], Iterable[Part]]
STAGES: Mapping[str, tuple[str, Facts, Parts]] = {
    "tokenizer": ("Tokenizers", tokenizer_section.facts, tokenizer_section.parts),
    "pretrain": ("Pretraining", pretrain_section.facts, pretrain_section.parts),
    "sft": ("Instruction tuning", sft_section.facts, sft_section.parts),
    "evaluate": ("Evaluation", evaluate_section.facts, evaluate_section.parts),
}


def title(run: Run) -> str:
    """What a run's stage is called."""
    return STAGES[run.stage][0] if run.stage in STAGES else "Run"


def headline(run: Run) -> Mapping[str, str]:
    """The numbers of a run that stand first, the most important one in front."""
    return STAGES[run.stage][1](run) if run.stage in STAGES else {}


def summary(run: Run) -> Html:
    """State, times and headline numbers, and why it stopped where it did."""
    return joined([recipe_section.described(run), facts({**headline(run), **history_section.facts(run)}), history_section.message(run)])


def of_run(run: Run) -> list[Part]:
    """All that a page tells of one run, but the machine."""
    found = STAGES[run.stage][2](run) if run.stage in STAGES else ()
    terms = folded("What the measures mean", definitions(run.result.get("definitions", {})))
    return [recipe_section.part(run), *found, estimate_section.part(run), history_section.starts(run), Part("Definitions", terms)]
