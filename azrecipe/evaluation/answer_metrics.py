"""Compare models' answers with the references of held-out conversations.

It reports chrF, chrF++ and ROUGE-L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import regex

from azrecipe.data import conversations
from azrecipe.data.inputs import Inputs
from azrecipe.recipe.load import load_run_config
from azrecipe.recipe.types import Answers, SftConfig
from azrecipe.tokenization.chat_templates import Messages
from azrecipe.utils.bootstrap import BootstrapEstimate, Resampling

WORD_PATTERN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")


@dataclass(frozen=True)
class HeldOutQuestion:
    """A held-out conversation before an answer, and its reference answer."""

    messages: Messages
    reference: str


class HeldOutQuestions(NamedTuple):
    """The questions of a run, and its number of held-out conversations."""

    questions: list[HeldOutQuestion]
    num_held_out: int


def load_questions(inputs: Inputs, answers: Answers) -> HeldOutQuestions:
    """Load the questions of an sft run's held-out conversations.

    Args:
        inputs: The recipe's inputs, which record what is read.
        answers: The recipe's `answers`.

    Raises:
        RecipeError: The run is not one of sft, or holds out nothing.
    """
    run = inputs.find_run(answers.output_of, "answers", "output_of")
    held_out = _load_held_out(inputs, load_run_config(run.path / "recipe.yaml"))
    if not held_out:
        raise inputs.recipe.error(
            f"{answers.output_of} holds out no conversation: raise its data.validation.held_out.fraction", "answers", "output_of"
        )
    selected = sorted(held_out, key=conversations.hash_row)[: answers.max_conversations]
    questions = []
    for messages in selected:
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if last > 0:  # skip a conversation that the assistant opens
            questions.append(HeldOutQuestion(messages[:last], messages[last]["content"]))
    return HeldOutQuestions(questions, len(held_out))


def _load_held_out(inputs: Inputs, config: Any) -> list[Messages]:
    """Read and split an sft run's conversations as its stage does."""
    if not isinstance(config, SftConfig):
        raise inputs.recipe.error(f"the run is one of a {config.stage} recipe: only sft holds out conversations", "answers", "output_of")
    if config.method != "sft":
        raise inputs.recipe.error("the run trained on preferences: only method: sft holds out conversations", "answers", "output_of")
    sources = [inputs.locate_source(source, "answers", "datasets", i) for i, source in enumerate(config.data.datasets)]
    rows = [messages for source in sources for messages in conversations.read_conversations(source)]
    return conversations.split_held_out(rows, config.data.validation.held_out.fraction)[1]


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words for ROUGE.

    A word is made of letters, digits and marks of any script. The dot that lower() leaves of İ is removed. I and ı stay different.
    """
    return [word.replace("\u0307", "") for word in WORD_PATTERN.findall(text.lower())]


class RougeTokenizer:
    """A tokenizer for rouge_score that keeps letters beyond a-z.

    rouge_score's own one drops all but a-z and 0-9.
    """

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words."""
        return split_words(text)


def score_rouge_l(reference: str, output: str) -> float:
    """Compute the ROUGE-L F measure of one answer, 0 to 100."""
    return 100 * float(_load_rouge_scorer().score(reference, output)["rougeL"].fmeasure)


@cache
def _load_rouge_scorer() -> Any:
    """Load rouge_score's scorer, once a process."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=RougeTokenizer())


def estimate_answer_metrics(outputs: Sequence[str], references: Sequence[str], resampling: Resampling) -> dict[str, BootstrapEstimate]:
    """Estimate chrF, chrF++ and ROUGE-L of a model's answers.

    chrF is that of all answers together, as sacrebleu's corpus_score computes it. ROUGE-L is the mean over answers.

    Args:
        outputs: The model's answers.
        references: The reference answer of each.
        resampling: Bootstrap resamples of the questions.

    Returns:
        An estimate for each of "chrf", "chrf++" and "rouge_l".
    """
    rouge = np.array([score_rouge_l(reference, output) for reference, output in zip(references, outputs, strict=True)])
    return {
        "chrf": _estimate_chrf(outputs, references, resampling, 0),
        "chrf++": _estimate_chrf(outputs, references, resampling, 2),
        "rouge_l": resampling.estimate_ratio(rouge, np.ones(len(rouge))),
    }


def _estimate_chrf(outputs: Sequence[str], references: Sequence[str], resampling: Resampling, word_order: int) -> BootstrapEstimate:
    """Estimate chrF from the sums of n-gram counts over each resample."""
    from sacrebleu.metrics import CHRF

    class CountedChrf(CHRF):  # type: ignore[misc]
        """sacrebleu's metric, with the counts that its own bootstrap uses."""

        def counts(self) -> list[list[int]]:
            """Count the n-grams of each answer."""
            counts: list[list[int]] = self._extract_corpus_statistics(list(outputs), [list(references)])
            return counts

        def score(self, counts: Any) -> float:
            """Compute chrF from summed counts."""
            return float(self._compute_score_from_stats(list(counts)).score)

    metric = CountedChrf(word_order=word_order)
    counts = np.array(metric.counts())
    resampled = np.stack([resampling.sum_by_resample(column) for column in counts.T], axis=1)
    return BootstrapEstimate(metric.score(counts.sum(0)), np.array([metric.score(row) for row in resampled]))
