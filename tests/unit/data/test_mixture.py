"""The order of the data: exact shares, one order for every length, nothing lost and nothing invented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azrecipe.data import mixture
from azrecipe.data.mixture import BYTE_COLUMN, TOKEN_COLUMN, Mixture, compute_temperature_weights
from azrecipe.data.packing import DocumentDelimiters, PackedText, Packing, build_layout
from azrecipe.data.phase_schedule import OutOfText, PhaseSchedule, plan_phases
from azrecipe.data.token_store import TokenStore
from azrecipe.recipe.types import Phase


def stored(lengths: list[int], first: int, bytes_per_token: int = 3) -> TokenStore:
    """A store of documents whose tokens are first, first + 1, …: each token tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (np.arange(offsets[-1]) + first).astype(np.uint32)
    return TokenStore(f"s{first}", tokens, offsets, np.asarray(lengths, np.int64) * bytes_per_token, 0)


def wrapped(max_length: int) -> Packing:
    return Packing("wrapped", max_length, DocumentDelimiters(bos=1, eos=2))


def text(mix: Mixture, count: int, max_length: int, start: int = 0) -> PackedText:
    """The first sequences of a mix, wrapped."""
    return PackedText(build_layout(mix, wrapped(max_length), start), wrapped(max_length), 0, count)


def planned(mix: Mixture, *phases: Phase, start: int = 0) -> PhaseSchedule:
    """Phases in steps of 4 sequences of 10 tokens, wrapped."""
    return plan_phases(build_layout(mix, wrapped(10), start), wrapped(10), phases, 4)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    stores=st.lists(lengths, min_size=2, max_size=4), weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4), seed=st.integers(0, 5)
)
def test_every_source_has_its_share_in_any_window(stores: list[list[int]], weights: list[float], seed: int) -> None:
    """To within one document of each source at either end of a window: an end is off by that much at most, whatever its length."""
    mix = Mixture(
        [stored(s, 10_000 * i, bytes_per_token=3 + i) for i, s in enumerate(stores)], weights[: len(stores)], seed, specials_per_document=2
    )
    order = mix.build_order(size=3 * mix.epoch_bytes)
    sizes = order.read_counts(0, len(order))[:, BYTE_COLUMN]
    all_bytes = np.concatenate([[0], np.cumsum(sizes)])
    slack = sum(int(store.sizes.max()) for store in mix.stores) + 1e-6
    for source, share in enumerate(mix.shares):
        off = np.concatenate([[0], np.cumsum(np.where(order.source == source, sizes, 0))]) - share * all_bytes
        assert np.abs(off).max() <= slack
        for window in (1, 7, 50, len(order)):
            assert np.abs(off[window:] - off[:-window]).max(initial=0) <= 2 * slack


@settings(max_examples=40, deadline=None)
@given(a=lengths, b=lengths, weight=st.floats(0.05, 20), seed=st.integers(0, 5))
def test_of_two_sources_each_has_its_share_to_within_one_document_at_any_point(
    a: list[int], b: list[int], weight: float, seed: int
) -> None:
    mix = Mixture([stored(a, 0), stored(b, 10_000, bytes_per_token=5)], [weight, 1], seed, specials_per_document=2)
    order = mix.build_order(size=3 * mix.epoch_bytes)
    sizes = order.read_counts(0, len(order))[:, BYTE_COLUMN]
    slack = max(int(store.sizes.max()) for store in mix.stores)
    for source in (0, 1):
        given_bytes = np.cumsum(np.where(order.source == source, sizes, 0))
        assert np.all(np.abs(given_bytes - mix.shares[source] * np.cumsum(sizes)) <= slack + 1e-6)


@settings(max_examples=25, deadline=None)
@given(a=lengths, b=lengths, seed=st.integers(0, 5), asked=st.lists(st.integers(1, 900), min_size=1, max_size=4))
def test_a_longer_order_begins_with_the_shorter_one_however_it_is_made(a: list[int], b: list[int], seed: int, asked: list[int]) -> None:
    long = Mixture([stored(a, 0), stored(b, 10_000)], [3, 1], seed, specials_per_document=1).build_order(tokens=2_000)
    mix = Mixture([stored(a, 0), stored(b, 10_000)], [3, 1], seed, specials_per_document=1)
    for tokens in asked:
        short = mix.build_order(tokens=tokens)
        assert short.tokens >= tokens
        both = min(len(short), len(long))
        assert np.array_equal(short.source[:both], long.source[:both])
        assert np.array_equal(short.document[:both], long.document[:both])


def test_the_running_counts_are_those_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "BLOCK_DOCUMENTS", 4)
    mix = Mixture([stored([5, 9, 2, 7], 0), stored([3, 8, 20], 10_000, 5)], [3, 1], 1, specials_per_document=2)
    mix.build_order(tokens=60)
    order = mix.build_order(tokens=500)
    ends = np.cumsum(order.read_counts(0, len(order)), axis=0)
    assert (order.tokens, order.bytes) == tuple(ends[-1])
    assert [order.counts_before(n) for n in range(len(order))] == [(0, 0), *map(tuple, ends[:-1].tolist())]
    for at in range(1, order.tokens):
        assert order.find_document(TOKEN_COLUMN, at) == int(np.searchsorted(ends[:, TOKEN_COLUMN], at))
        assert order.find_document(TOKEN_COLUMN, at, "right") == int(np.searchsorted(ends[:, TOKEN_COLUMN], at, side="right"))
    assert order.find_document(TOKEN_COLUMN, order.tokens + 1) == len(order)


def test_the_order_and_its_name_are_those_of_runs_already_begun() -> None:
    mix = Mixture(
        [stored([5, 9, 2, 7, 30, 4, 6, 11], 0), stored([3, 8, 20, 5], 10_000, bytes_per_token=5)], [3, 1], 7, specials_per_document=2
    )
    order = mix.build_order(size=600)
    assert mix.fingerprint == "08267cc6173ce3c6403658785ac1bdfe"
    assert order.source[:21].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert order.document[:21].tolist() == [0, 2, 6, 7, 2, 4, 5, 1, 3, 2, 3, 4, 0, 1, 3, 0, 6, 7, 1, 5, 7]


def test_each_epoch_holds_every_document_once_in_an_order_of_its_own() -> None:
    mix = Mixture([stored([5] * 50, 0)], [1], seed=7, specials_per_document=0)
    order = mix.build_order(tokens=500)
    first, second = order.document[:50], order.document[50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)
    assert mix.count_epochs(order, 100) == [2.0]
    assert mix.count_epochs(order, 50, np.asarray([50, 51])) == [1.04]


@settings(max_examples=25, deadline=None)
@given(a=lengths, b=lengths, limits=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)), seed=st.integers(0, 5))
def test_a_source_that_is_not_begun_again_is_used_to_its_limit(a: list[int], b: list[int], limits: tuple[float, float], seed: int) -> None:
    mix = Mixture([stored(a, 0), stored(b, 10_000)], [4, 1], seed, 1, limits)
    order = mix.build_order(tokens=10**9)
    assert mix.ended
    for source, (epochs, limit) in enumerate(zip(mix.count_epochs(order, len(order)), limits, strict=True)):
        store = mix.stores[source]
        assert limit - 1e-9 <= epochs < limit + store.sizes.max() / store.num_bytes  # the document that reaches it is the last
        read = np.bincount(order.document[order.source == source], minlength=store.num_documents)
        assert read.max() - read.min() <= 1
    free = Mixture([stored(a, 0), stored(b, 10_000)], [4, 1], seed, 1)
    assert mix.fingerprint != free.fingerprint
    last = [int(np.flatnonzero(order.source == source)[-1]) for source in (0, 1)]
    both = min(last)  # until the first of them has left, the order is that of an endless mix
    assert np.array_equal(order.document[:both], free.build_order(tokens=order.tokens).document[:both])


def test_temperature_makes_shares_of_sizes() -> None:
    stores = [stored([100] * 16, 0), stored([100], 10_000)]
    assert Mixture(stores, compute_temperature_weights(stores, 1), 1, 0).shares == pytest.approx([16 / 17, 1 / 17])
    assert Mixture(stores, compute_temperature_weights(stores, 2), 1, 0).shares == pytest.approx([4 / 5, 1 / 5])
    assert Mixture(stores, compute_temperature_weights(stores, 1e9), 1, 0).shares == pytest.approx([1 / 2, 1 / 2])


def test_packed_sequences_hold_every_token_of_every_document_in_order() -> None:
    mix = Mixture([stored([3, 8, 1, 20, 5], 100)], [1], seed=1, specials_per_document=2)
    packed = text(mix, 40, 10)
    stream = np.concatenate([packed[i]["input_ids"].numpy() for i in range(40)])
    expected = np.concatenate([[1, *mix.stores[0].read_document(d), 2] for d in mix.build_order(tokens=400).document])
    assert np.array_equal(stream, expected[:400])


def test_positions_restart_at_each_document_and_no_loss_is_taken_on_what_follows_another() -> None:
    mix = Mixture([stored([3, 8, 1, 20, 5], 100)], [1], seed=1, specials_per_document=2)
    packed = text(mix, 40, 10)
    for i in range(40):
        sequence = packed[i]
        starts = sequence["input_ids"] == 1
        starts[0] = True
        assert bool((sequence["position_ids"][starts] == 0).all())
        assert bool((sequence["labels"][starts] == -100).all())
        assert bool((sequence["labels"][~starts] == sequence["input_ids"][~starts]).all())
        assert bool((sequence["position_ids"][1:][~starts[1:]] == sequence["position_ids"][:-1][~starts[1:]] + 1).all())


def test_bytes_and_tokens_are_each_others_inverse() -> None:
    order = Mixture([stored([30, 80, 10], 100)], [1], seed=1, specials_per_document=2).build_order(tokens=1000)
    for size in (1, 90, 91, 200, 1000):
        assert order.bytes_at(order.token_at(size)) == pytest.approx(size, abs=4)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_steps": 3}, 3),
        ({"max_tokens": 4 * 10 * 3}, 3),
        ({"max_tokens": 4 * 10 * 3 + 1}, 4),
        ({"num_train_epochs": 2}, 5),  # 2 x (88 tokens + 5 x 2 marks) = 196 tokens, 40 a step
        ({"max_bytes": 88 * 3}, 3),  # 98 tokens
    ],
)
def test_every_way_to_give_a_length_becomes_whole_steps(length: dict[str, int], steps: int) -> None:
    mix = Mixture([stored([20, 30, 8, 25, 5], 100)], [1], seed=1, specials_per_document=2)
    schedule = planned(mix, Phase("one", ["all"], 1e-3, **length))
    assert schedule.phases[0].steps == steps
    assert len(schedule.build_dataset(0)) == steps * 4


def test_a_phase_goes_on_where_the_one_before_ended() -> None:
    mix = Mixture([stored([20, 30, 8, 25, 5], 100)], [1], seed=1, specials_per_document=2)
    two = planned(mix, Phase("a", ["all"], 1e-3, max_steps=2), Phase("b", ["all"], 1e-3, max_steps=3))
    alone = planned(mix, Phase("b", ["all"], 1e-3, max_steps=3), start=80)
    assert [two.build_dataset(1)[i]["input_ids"].tolist() for i in range(12)] == [
        alone.build_dataset(0)[i]["input_ids"].tolist() for i in range(12)
    ]
    assert two.end == alone.end
    assert two.end.start == 200


def test_a_phase_may_end_with_the_text_and_not_ask_for_more() -> None:
    def once() -> Mixture:
        return Mixture([stored([20, 30, 8, 25, 5], 100)], [1], 1, 2, [1.0])  # 98 tokens, 264 bytes: 2 steps of 40 and a rest

    assert planned(once(), Phase("one", ["all"], 1e-3, num_train_epochs=1)).phases[0].steps == 2
    assert planned(once(), Phase("one", ["all"], 1e-3, max_tokens=98)).phases[0].steps == 2
    assert planned(once(), Phase("one", ["all"], 1e-3, max_steps=2)).source_epochs == [1.0]
    for length in ({"max_steps": 3}, {"max_tokens": 140}, {"max_bytes": 400}, {"num_train_epochs": 1.5}):
        with pytest.raises(OutOfText, match="are left"):
            planned(once(), Phase("one", ["all"], 1e-3, **length))  # type: ignore[arg-type]
    halves = [Phase(name, ["all"], 1e-3, num_train_epochs=0.5) for name in "ab"]
    with pytest.raises(OutOfText, match="phase c") as error:
        planned(once(), halves[0], Phase("c", ["all"], 1e-3, num_train_epochs=1))
    assert error.value.phase_index == 1
