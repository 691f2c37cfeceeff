"""Phases with a mix of their own: the shares of each, every document once before any comes again, one order for every length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azrecipe.data import best_fit_packing, mixture
from azrecipe.data.mixture import BYTE_COLUMN, TOKEN_COLUMN, Mixture
from azrecipe.data.packing import DocumentDelimiters, Packing, build_layout
from azrecipe.data.phase_schedule import OutOfText, PhaseSchedule, Position, plan_phases
from azrecipe.data.token_store import TokenStore
from azrecipe.recipe.types import Phase, PhaseData
from tests.unit.data.test_mixture import stored

BATCH = 4
strategies = pytest.mark.parametrize("strategy", ["wrapped", "bfd", "unpacked"])


def phases(*lengths: dict[str, Any]) -> list[Phase]:
    """Phases of these lengths; each may have a mix of its own, which `planned` is told."""
    return [Phase(f"p{i}", ["all"], 1e-3, data=PhaseData({}), **length) for i, length in enumerate(lengths)]


def planned(
    stores: list[TokenStore],
    strategy: str,
    lengths: list[dict[str, Any]],
    weights: list[list[float]],
    *,
    position: Position | None = None,
    max_epochs: list[float] | None = None,
) -> PhaseSchedule:
    """Lay phases over stores, in sequences of 16 tokens; `position` is where an earlier run ended."""
    before = list(position.mixes) if position else []
    mix = Mixture(stores, before.pop(0).weights if before else weights[0], 7, 2, max_epochs)
    for earlier in before:
        mix.change_weights(earlier.token, earlier.weights)
    packing = Packing(strategy, 16, DocumentDelimiters(bos=1, eos=2), 3)
    layout = build_layout(mix, packing, position.start if position else 0)
    assert position is None or position.fingerprint == layout.fingerprint
    return plan_phases(layout, packing, phases(*lengths), BATCH, weights)


def parts(schedule: PhaseSchedule, phase: int) -> list[tuple[int, int, int]]:
    """What a phase reads, sequence after sequence: source, document, first token."""
    data = schedule.build_dataset(phase)
    return [(source, document, first) for i in range(len(data)) for source, document, first, _tokens in data.list_documents(i)]


def stores(seed: int = 1) -> list[TokenStore]:
    draw = np.random.default_rng(seed)
    return [
        stored(draw.integers(1, 50, 90).tolist(), 0),
        stored(draw.integers(1, 50, 60).tolist(), 100_000, bytes_per_token=5),
        stored(draw.integers(1, 50, 40).tolist(), 200_000),
    ]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 25), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_each_phase_has_its_shares_to_within_a_document(weights: list[tuple[float, float]], steps: list[int], seed: int) -> None:
    two = stores(seed)[:2]
    schedule = planned(two, "wrapped", [{"max_steps": n} for n in steps[: len(weights)]], [list(pair) for pair in weights])
    order, slack = schedule.mix.build_order(), max(int(store.sizes.max()) for store in two) + 1e-6
    begin = 0
    for i, pair in enumerate(weights):
        end, _ = schedule.layout.find_started_documents(schedule.phases[i].first_sequence + schedule.phases[i].steps * BATCH)
        sizes = order.read_counts(begin, end)[:, BYTE_COLUMN]
        of_first = np.cumsum(np.where(order.source[begin:end] == 0, sizes, 0))
        assert np.all(np.abs(of_first - pair[0] / sum(pair) * np.cumsum(sizes)) <= slack)
        if end > begin:
            assert schedule.phase_shares[f"p{i}"][0] == pytest.approx(of_first[-1] / sizes.sum())
        begin = end


@strategies
def test_no_document_comes_again_before_all_were_read_whatever_the_phases_mix(strategy: str) -> None:
    """Of each source the order has rounds in which every document comes once, and the sequences have the order's documents whole."""
    lengths = [{"max_steps": 9}, {"max_steps": 31}, {"max_tokens": 1000}, {"max_bytes": 4000}, {"max_steps": 40}]
    mixes = [[1, 0, 4], [1, 1, 1], [0, 0, 1], [5, 1, 0], [1, 3, 1]]
    schedule = planned(stores(), strategy, lengths, mixes)  # type: ignore[arg-type]
    order = schedule.mix.build_order()
    assert len(schedule.mix.mixes) == 5
    for source, store in enumerate(schedule.mix.stores):
        documents, count = order.document[order.source == source], store.num_documents
        assert len(documents) > count
        for begin in range(0, len(documents), count):
            epoch = documents[begin : begin + count].tolist()
            assert len(set(epoch)) == len(epoch)
    before_last = order.find_document(TOKEN_COLUMN, schedule.mix.mixes[-1].token) + 1
    spans, sequence = [], 0
    tokens = order.counts_before(before_last).tokens
    while sum(span.num_tokens for span in spans) < tokens:
        spans += schedule.layout.find_spans(sequence)
        sequence += 1
    read = np.bincount([span.index for span in spans], [span.num_tokens for span in spans])
    assert read[:before_last].tolist() == order.read_counts(0, before_last)[:, TOKEN_COLUMN].tolist()
    assert sequence - schedule.phases[4].first_sequence <= 4  # what is left of one document of up to 52 tokens, in sequences of 16
    for phase, weights in enumerate(mixes):
        assert sum(weights[source] == 0 for source, _document, _first in parts(schedule, phase)) <= 4


@strategies
def test_a_source_without_weight_starts_later_at_its_first_document(strategy: str) -> None:
    three = stores()
    alone = Mixture(three, [0, 1, 0], 7, 2).build_order(tokens=500)
    schedule = planned(three, strategy, [{"max_steps": 20}, {"max_steps": 30}], [[1, 0, 1], [1, 1, 0]])
    order = schedule.mix.build_order()
    second = order.document[order.source == 1]
    both = min(len(second), len(alone))
    assert both > 10
    assert np.array_equal(second[:both], alone.document[:both])
    assert not [key for key in parts(schedule, 0) if key[0] == 1]
    assert schedule.phase_shares["p0"][1] == 0


@strategies
def test_phases_that_repeat_the_mix_change_nothing(strategy: str) -> None:
    three, lengths = stores(), [{"max_steps": 10}, {"max_tokens": 700}]
    plain = planned(three, strategy, lengths, [[3, 1, 1]] * 2)
    scaled = planned(three, strategy, lengths, [[3, 1, 1], [6, 2, 2]])
    assert plain.layout.fingerprint == scaled.layout.fingerprint == build_layout(Mixture(three, [3, 1, 1], 7, 2), plain.packing).fingerprint
    assert plain.end == scaled.end
    assert all(parts(plain, i) == parts(scaled, i) for i in (0, 1))


@strategies
def test_other_later_phases_leave_the_earlier_ones_as_they_are(strategy: str) -> None:
    lengths = [{"max_steps": 11}, {"max_steps": 6}]
    short = planned(stores(), strategy, lengths, [[1, 1, 1], [1, 4, 0]])
    long = planned(stores(), strategy, [*lengths[:1], {"max_steps": 40}], [[1, 1, 1], [1, 4, 0]])
    assert parts(short, 0) == parts(long, 0)
    if strategy != "bfd":
        assert parts(long, 1)[: len(parts(short, 1))] == parts(short, 1)
    assert short.layout.fingerprint == long.layout.fingerprint
    other = planned(stores(), strategy, lengths, [[1, 1, 1], [1, 5, 0]])
    assert other.layout.fingerprint != short.layout.fingerprint
    assert parts(other, 0) == parts(short, 0)


@strategies
def test_a_run_that_goes_on_with_another_mix_reads_on(strategy: str) -> None:
    three = stores()
    first, second = planned(three, strategy, [{"max_steps": 23}, {"max_steps": 9}], [[3, 1, 1], [1, 1, 1]]), {"max_steps": 12}
    further = planned(three, strategy, [second], [[0, 1, 1]], position=first.end)
    same = planned(three, strategy, [second], [[1, 1, 1]], position=first.end)
    assert [mix.weights for mix in further.mix.mixes] == [(3, 1, 1), (1, 1, 1), (0, 1, 1)]
    assert same.layout.fingerprint == first.layout.fingerprint
    whole = planned(three, strategy, [{"max_steps": 23}, {"max_steps": 9}, second], [[3, 1, 1], [1, 1, 1], [0, 1, 1]])
    if strategy != "bfd":  # there a single run ends a window where the mix changes, and an earlier run cannot know
        assert parts(further, 0) == parts(whole, 2)
        assert (further.end.start, further.end.fingerprint, further.end.mixes) == (whole.end.start, whole.end.fingerprint, whole.end.mixes)
    runs = ((first, 32 * BATCH), (further, 12 * BATCH))
    tokens = [
        (span.index, span.first_token + n)
        for run, end in runs
        for i in range(end)
        for span in run.layout.find_spans(i)
        for n in range(span.num_tokens)
    ]
    assert len(tokens) == len(set(tokens)) == first.num_tokens + further.num_tokens


@pytest.mark.parametrize("length", [{"max_tokens": 700}, {"max_bytes": 1500}, {"num_train_epochs": 0.4}])
@strategies
def test_a_phase_before_a_change_has_the_text_that_it_asks_for(strategy: str, length: dict[str, Any]) -> None:
    for seed in range(12):
        schedule = planned(stores(seed), strategy, [length, {"max_steps": 5}], [[1, 1, 0], [0, 1, 3]])
        data, epoch = schedule.build_dataset(0), schedule.mix.epoch_bytes
        asked = {"max_tokens": (700, 0), "max_bytes": (0, 1500), "num_train_epochs": (0, 0.4 * epoch)}[next(iter(length))]
        assert data.count_tokens(len(data)) >= asked[0] and data.count_bytes(len(data)) >= asked[1]
        steps = len(data) - 2 * BATCH  # the packing before the change may hold a little less than that after it: a step more, at most
        assert data.count_tokens(steps) < asked[0] or data.count_bytes(steps) < asked[1]
        assert schedule.num_tokens == data.count_tokens(len(data)) + schedule.build_dataset(1).count_tokens(5 * BATCH)


def test_limits_count_over_the_whole_run() -> None:
    """A source of one epoch that phase 1 has used up is not there in phase 2, and the others share the rest."""
    three = stores()
    schedule = planned(
        three, "wrapped", [{"max_bytes": three[2].num_bytes}, {"max_steps": 30}], [[0, 0, 1], [1, 1, 1]], max_epochs=[1.0, 1.0, 1.0]
    )
    assert schedule.source_epochs[2] == 1.0
    assert schedule.phase_shares["p1"][:2] == pytest.approx([0.5, 0.5], abs=0.05)
    with pytest.raises(OutOfText, match="phase p1 needs 1 steps, but"):
        planned(three, "wrapped", [{"max_bytes": three[2].num_bytes}, {"max_steps": 1}], [[0, 0, 1], [0, 0, 1.5]], max_epochs=[1.0] * 3)
    whole = planned(three, "wrapped", [{"max_steps": 4}, {"num_train_epochs": 0.9}], [[0, 0, 1], [5, 1, 1]], max_epochs=[1.0] * 3)
    assert max(whole.source_epochs) == 1.0


def test_the_running_counts_hold_across_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "BLOCK_DOCUMENTS", 4)
    mix = Mixture(stores(), [3, 1, 1], 1, specials_per_document=2)
    for token, weights in ((333, [1, 0, 1]), (333, [1, 5, 1]), (900, [0, 1, 2])):
        mix.change_weights(token, weights)
    mix.build_order(tokens=1000)
    order = mix.build_order(tokens=5000)
    assert len(mix.mixes) == 3
    ends = np.cumsum(order.read_counts(0, len(order)), axis=0)
    assert [order.counts_before(n) for n in range(len(order))] == [(0, 0), *map(tuple, ends[:-1].tolist())]
    for token in range(1, order.tokens, 7):
        assert order.find_document(TOKEN_COLUMN, token) == int(np.searchsorted(ends[:, TOKEN_COLUMN], token))
    at_once = Mixture(stores(), [3, 1, 1], 1, specials_per_document=2)
    for later in mix.mixes[1:]:
        at_once.change_weights(later.token, later.weights)
    assert at_once.fingerprint == mix.fingerprint
    assert np.array_equal(at_once.build_order(tokens=5000).document[: len(order)], order.document)


def test_small_windows_are_cut_where_the_mix_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_fit_packing, "WINDOW_SEQUENCES", 12)
    lengths = [{"max_steps": n} for n in (1, 2, 1, 9, 1, 1, 20)]
    mixes = [[1, 1, 1], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 2, 3]]
    schedule = planned(stores(), "bfd", lengths, mixes)  # type: ignore[arg-type]
    read = [key for i in range(7) for key in parts(schedule, i)]
    for source, store in enumerate(schedule.mix.stores):
        counts = [read.count(key) for key in {key for key in read if key[0] == source}]
        assert max(counts) - min(counts) <= (1 if max(counts) > 1 or store.num_documents else 0)
    for i, weights in enumerate(mixes):
        wrong = sum(weights[key[0]] == 0 for key in parts(schedule, i))
        assert wrong <= 4, (i, wrong)  # what is left of one document of up to 52 tokens, in sequences of 16
