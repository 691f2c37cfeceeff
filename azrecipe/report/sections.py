"""Knows which module shows which stage, and the order of what a page tells of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from azrecipe.report import asked, evaluation, foretold, happened, pretraining, tokenizers, tuning
from azrecipe.report.markup import Html, Part, definitions, facts, folded, joined
from azrecipe.report.runs import Run

Facts = Callable[[Run], Mapping[str, str]]
Parts = Callable[[Run], Iterable[Part]]
STAGES: Mapping[str, tuple[str, Facts, Parts]] = {
    "tokenizer": ("Tokenizers", tokenizers.facts, tokenizers.parts),
    "pretrain": ("Pretraining", pretraining.facts, pretraining.parts),
    "sft": ("Instruction tuning", tuning.facts, tuning.parts),
    "evaluate": ("Evaluation", evaluation.facts, evaluation.parts),
}


def title(run: Run) -> str:
    """What a run's stage is called."""
    return STAGES[run.stage][0] if run.stage in STAGES else "Run"


def headline(run: Run) -> Mapping[str, str]:
    """The numbers of a run that stand first, the most important one in front."""
    return STAGES[run.stage][1](run) if run.stage in STAGES else {}


def summary(run: Run) -> Html:
    """State, times and headline numbers, and why it stopped where it did."""
    return joined([asked.described(run), facts({**headline(run), **happened.facts(run)}), happened.message(run)])


def of_run(run: Run) -> list[Part]:
    """All that a page tells of one run, but the machine."""
    found = STAGES[run.stage][2](run) if run.stage in STAGES else ()
    terms = folded("What the measures mean", definitions(run.result.get("definitions", {})))
    return [asked.part(run), *found, foretold.part(run), happened.starts(run), Part("Definitions", terms)]
