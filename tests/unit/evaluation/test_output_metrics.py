"""The measures of what models write, against their definitions and the libraries' own figures."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from azrecipe.errors import CannotRun
from azrecipe.evaluation import answer_metrics, output_metrics
from azrecipe.evaluation.output_metrics import ExpectedOutput, LanguageDetector
from azrecipe.recipe.rules.evaluate import LANGUAGES
from azrecipe.utils.bootstrap import BootstrapEstimate, Resampling, compare_to_baseline

OUTPUTS = ["Kənddə bir qoca yaşayırdı və hər səhər bağa gedərdi.", "The old man went to the river.", "", "su su su su su su"]
REFERENCES = [
    "Kənddə qoca bir kişi yaşayırdı, o hər səhər bağa gedərdi.",
    "Qoca çaya getdi.",
    "Bakı.",
    "Su axır.",
]  # fmt: skip


def line(output: str, **more: Any) -> dict[str, Any]:
    return {"output": output, "tokens": 5, "ended": True, **more}


def test_the_languages_are_lingua_s() -> None:
    from lingua import Language

    assert {found.iso_code_639_1.name.lower(): found.name.title() for found in Language.all()} == LANGUAGES


def test_fidelity_is_the_share_of_outputs_and_of_their_characters() -> None:
    wanted = [ExpectedOutput("az", "Latin")] * 3 + [ExpectedOutput("en", None)]
    told = output_metrics.annotate_language([line(text) for text in OUTPUTS], wanted, LanguageDetector(["az", "en", "ru", "tr"]))
    assert [each["language"] for each in told[:3]] == ["az", "en", None]
    found = output_metrics.estimate_output_metrics(told, wanted, Resampling(list("abcd"), 1))
    right = told[3]["language"] == "en"
    assert found["language"].value == (1 + right) / 4
    assert found["language_characters"].value == (len(OUTPUTS[0]) + right * len(OUTPUTS[3])) / sum(map(len, OUTPUTS))
    assert found["script"].value == 1  # of the first three outputs alone
    assert (found["tokens"].value, found["ended"].value, found["words"].value) == (5, 1, sum(len(text.split()) for text in OUTPUTS) / 4)


def test_letters_of_another_script_are_counted() -> None:
    assert output_metrics.count_script_letters("Kənd село, 12!", "Latin") == (4, 8)
    assert output_metrics.count_script_letters("١٢٣ !", "Latin") == (0, 0)


@pytest.mark.parametrize(("text", "found"), [("a b c", (0, 0)), ("a b c d e", (0, 2)), ("a b c d a b c d", (1, 5)), ("su " * 7, (3, 4))])
def test_repetition_is_the_share_of_n_grams_that_were_there_before(text: str, found: tuple[int, int]) -> None:
    assert output_metrics.count_repeated_ngrams(text) == found


def test_a_language_without_lingua_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(CannotRun, match=r"pip install 'azrecipe\[evaluation\]'"):
        LanguageDetector(["az"])


def test_chrf_is_sacrebleu_s_and_its_resamples_are_of_whole_answers() -> None:
    from sacrebleu.metrics import CHRF

    drawn = Resampling(list("abcd"), 3)
    found = answer_metrics.estimate_answer_metrics(OUTPUTS, REFERENCES, drawn)
    for name, order in (("chrf", 0), ("chrf++", 2)):
        metric = CHRF(word_order=order)
        assert found[name].value == pytest.approx(metric.corpus_score(OUTPUTS, [REFERENCES]).score, abs=1e-9)
        for nth in (0, 17, 999):
            rows = np.repeat(np.arange(4), drawn.draw_counts[nth])
            again = metric.corpus_score([OUTPUTS[i] for i in rows], [[REFERENCES[i] for i in rows]]).score
            assert found[name].resamples[nth] == pytest.approx(again, abs=1e-9)


def test_rouge_counts_words_of_any_alphabet() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    reference, output = "Kənddə qoca yaşayırdı", "kənddə QOCA yaşayırdı."
    assert answer_metrics.score_rouge_l(reference, output) == 100
    assert answer_metrics.score_rouge_l("Қазақстан — Отан", "қазақстан") == pytest.approx(100 * 2 / 3)
    assert answer_metrics.split_words("İstanbul, 5-ci ev! Dağ’ın") == ["istanbul", "5", "ci", "ev", "dağ", "ın"]
    own = RougeScorer(["rougeL"])
    assert own.score("şə öü", "çı ğə")["rougeL"].fmeasure == own.score("Қазақ", "Отан")["rougeL"].fmeasure == 0
    assert own.score("ışıq", "şı")["rougeL"].fmeasure == 0 == answer_metrics.score_rouge_l("ışıq", "şı")
    assert own.score("dəniz", "dənəz")["rougeL"].fmeasure > 0  # its own tokenizer takes ə for white space, and "d", "n", "z" for words
    assert answer_metrics.score_rouge_l("dəniz", "dənəz") == 0


def test_equal_models_differ_by_nothing_and_pairing_narrows_intervals() -> None:
    random = np.random.default_rng(5)
    documents = random.integers(10, 200, 60)
    better, worse = documents * 1.0, documents * 1.0 + random.normal(2, 0.5, 60)
    drawn, ones = Resampling([str(i) for i in range(60)], 1), np.ones(60)
    found = {
        name: {"a": drawn.estimate_ratio(values, ones)} for name, values in (("one", better), ("same", better.copy()), ("other", worse))
    }
    told = compare_to_baseline(drawn, found, "one")
    assert told["one"][1] == {}
    assert told["same"][1]["a"] == {"value": 0.0, "interval": [0.0, 0.0]}
    low, high = told["other"][1]["a"]["interval"]
    assert low < 2 < high
    assert high - low < 0.1 * (told["one"][0]["a"]["interval"][1] - told["one"][0]["a"]["interval"][0])


def test_what_cannot_be_measured_has_no_value() -> None:
    drawn = Resampling(list("ab"), 1)
    nothing = drawn.estimate_ratio(np.zeros(2), np.zeros(2))
    assert drawn.summarize(nothing) == {"value": None, "interval": None}
    assert drawn.summarize_difference(BootstrapEstimate(1.0, np.ones(1000)), nothing) == {"value": None, "interval": None}
