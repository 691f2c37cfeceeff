"""Answers against those that a test conversation has: which conversations an sft run held out, and chrF and ROUGE of what models say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import regex

from azrecipe.data import conversations
from azrecipe.data.inputs import Inputs
from azrecipe.recipe.load import of_run
from azrecipe.recipe.types import Answers, Sft
from azrecipe.tokenization.chat_templates import Messages
from azrecipe.utils.bootstrap import Estimate, Resampling

WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to the turn that is asked for, and the answer that it has there."""

    messages: Messages
    reference: str


def questions(inputs: Inputs, asked: Answers) -> tuple[list[Question], int]:
    """The questions of an sft run's held-out conversations, and how many of those there are.

    Raises RecipeError for a run that is none of sft, or that holds out nothing.
    """
    run = inputs.run_of(asked.output_of, "answers", "output_of")
    held_out = _held_out(inputs, of_run(run.path / "recipe.yaml"))
    if not held_out:
        raise inputs.recipe.problem(
            f"{asked.output_of} holds out no conversation: raise its data.validation.held_out.fraction", "answers", "output_of"
        )
    chosen = sorted(held_out, key=conversations.key)[: asked.max_conversations]
    found = []
    for messages in chosen:
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if last > 0:  # the assistant does not open the conversation
            found.append(Question(messages[:last], messages[last]["content"]))
    return found, len(held_out)


def _held_out(inputs: Inputs, config: Any) -> list[Messages]:
    """What the sft stage keeps from training, read and split by its own functions."""
    if not isinstance(config, Sft):
        raise inputs.recipe.problem(f"the run is one of a {config.stage} recipe: only sft holds out conversations", "answers", "output_of")
    if config.method != "sft":
        raise inputs.recipe.problem("the run learnt from preferences: only method: sft holds out conversations", "answers", "output_of")
    sources = [inputs.located(source, "answers", "datasets", i) for i, source in enumerate(config.data.datasets)]
    everything = [messages for source in sources for messages in conversations.read(source)]
    return conversations.split(everything, config.data.validation.held_out.fraction)[1]


def words(text: str) -> list[str]:
    """The words of a text for ROUGE: letters, digits and marks of any script, in lower case.

    The dot that lower() leaves of İ goes. I and ı stay apart where a language does not take them so.
    """
    return [word.replace("\u0307", "") for word in WORD.findall(text.lower())]


class Words:
    """What rouge_score asks of a tokenizer; its own one knows only a-z and 0-9, and loses every ə."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_l(reference: str, output: str) -> float:
    """The F measure of ROUGE-L of one answer, 0 to 100."""
    return 100 * float(_scorer().score(reference, output)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=Words())


def estimates(outputs: Sequence[str], references: Sequence[str], resampling: Resampling) -> dict[str, Estimate]:
    """chrF and chrF++ of all answers together, as sacrebleu's corpus_score gives them, and the mean ROUGE-L."""
    rouge = np.array([rouge_l(reference, output) for reference, output in zip(references, outputs, strict=True)])
    return {
        "chrf": _chrf(outputs, references, resampling, 0),
        "chrf++": _chrf(outputs, references, resampling, 2),
        "rouge_l": resampling.estimate(rouge, np.ones(len(rouge))),
    }


def _chrf(outputs: Sequence[str], references: Sequence[str], resampling: Resampling, word_order: int) -> Estimate:
    """chrF from the sums of the answers' n-gram counts; for a resample the sums over it."""
    from sacrebleu.metrics import CHRF

    class Counted(CHRF):  # type: ignore[misc]
        """sacrebleu's metric, with what its own bootstrap works on."""

        def counts(self) -> list[list[int]]:
            found: list[list[int]] = self._extract_corpus_statistics(list(outputs), [list(references)])
            return found

        def score(self, counts: Any) -> float:
            return float(self._compute_score_from_stats(list(counts)).score)

    metric = Counted(word_order=word_order)
    counts = np.array(metric.counts())
    resampled = np.stack([resampling.sums(column) for column in counts.T], axis=1)
    return Estimate(metric.score(counts.sum(0)), np.array([metric.score(row) for row in resampled]))
