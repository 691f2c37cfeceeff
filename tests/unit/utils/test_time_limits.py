"""A regular expression that backtracks without end is refused by its text and the name."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from azrecipe.errors import CommandError
from azrecipe.modeling.parameter_groups import set_trainable_parameters
from azrecipe.utils import time_limits
from azrecipe.utils.time_limits import TimeLimitError, limit_seconds, match_names

NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
EXPLODING = r"(([a-z_.0-9]+)+)+!"


@pytest.fixture(autouse=True)
def less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "PATTERN_SECONDS", 0.3)


def test_ordinary_patterns_match() -> None:
    assert match_names("layers", NAMES, is_whole=False) == NAMES[1:]
    assert match_names(r".*layers\.\d+.*", NAMES, is_whole=True) == NAMES[1:]
    assert match_names("layers", NAMES, is_whole=True) == []


def test_an_exploding_pattern_is_refused_with_the_name() -> None:
    with pytest.raises(CommandError, match=r"takes more than 0.3 seconds on the name model.embed_tokens.weight: it tries too many ways"):
        match_names(EXPLODING, NAMES, is_whole=True)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.parametrize("pattern", ["[", "(?P<a>", "a" * 5 + "{999999999999}"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(CommandError, match="is no regular expression"):
        match_names(pattern, NAMES, is_whole=True)


def test_limits_lie_within_each_other_and_other_threads_have_none() -> None:
    with limit_seconds(60):
        with pytest.raises(TimeLimitError), limit_seconds(0.05):
            time.sleep(5)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    entered = []

    def enter() -> None:
        with limit_seconds(0.01):
            entered.append(signal.getitimer(signal.ITIMER_REAL)[0])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [0.0]


@pytest.mark.parametrize("pattern", [EXPLODING, "["])
def test_trainable_parameters_name_it(pattern: str) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=8
    )
    with pytest.raises(CommandError, match=r"trainable_parameters: '.*' (takes more than|is no regular expression)"):
        set_trainable_parameters(transformers.LlamaForCausalLM(config), [pattern])
