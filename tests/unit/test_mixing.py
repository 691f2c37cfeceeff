"""The order of the data: exact shares, one order for every length, nothing lost and nothing invented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azrecipe.parts.mixing import Mix
from azrecipe.parts.packing import Borders, PackedText, Span, bytes_at, token_at
from azrecipe.parts.schedule import plan
from azrecipe.parts.tokens import Store
from azrecipe.recipe.types import Phase


def stored(lengths: list[int], first: int, bytes_per_token: int = 3) -> Store:
    """A store of documents whose tokens are first, first + 1, …: each token tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (np.arange(offsets[-1]) + first).astype(np.uint32)
    return Store(f"s{first}", tokens, offsets, np.asarray(lengths, np.int64) * bytes_per_token, 0)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(a=lengths, b=lengths, weight=st.floats(0.05, 20), seed=st.integers(0, 5))
def test_every_source_has_its_share_to_within_one_document_at_any_point(a: list[int], b: list[int], weight: float, seed: int) -> None:
    mix = Mix([stored(a, 0), stored(b, 10_000, bytes_per_token=5)], [weight, 1], seed, extra=2)
    order = mix.order(size=3 * mix.epoch_bytes)
    sizes = np.diff(np.concatenate([[0], order.byte_ends]))
    for source in (0, 1):
        given_bytes = np.cumsum(np.where(order.source == source, sizes, 0))
        slack = max(int(store.sizes.max()) for store in mix.stores)
        assert np.all(np.abs(given_bytes - mix.shares[source] * order.byte_ends) <= slack + 1e-6)


@settings(max_examples=40, deadline=None)
@given(a=lengths, b=lengths, seed=st.integers(0, 5))
def test_a_longer_order_begins_with_the_shorter_one(a: list[int], b: list[int], seed: int) -> None:
    mix = Mix([stored(a, 0), stored(b, 10_000)], [3, 1], seed, extra=1)
    short, long = mix.order(tokens=50), mix.order(tokens=2_000)
    n = len(short.source) - 1  # the last document of the shorter may tie with one that a longer horizon brings in
    assert np.array_equal(short.source[:n], long.source[:n])
    assert np.array_equal(short.document[:n], long.document[:n])


def test_each_epoch_holds_every_document_once_in_an_order_of_its_own() -> None:
    mix = Mix([stored([5] * 50, 0)], [1], seed=7, extra=0)
    order = mix.order(tokens=500)
    first, second = order.document[:50], order.document[50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)
    assert mix.epochs(order, 500) == [2.0]


def test_packed_sequences_hold_every_token_of_every_document_in_order() -> None:
    mix = Mix([stored([3, 8, 1, 20, 5], 100)], [1], seed=1, extra=2)
    order = mix.order(tokens=400)
    text = PackedText(mix, order, Borders(bos=1, eos=2), Span(0, 40, 10))
    stream = np.concatenate([text[i]["input_ids"].numpy() for i in range(40)])
    expected = np.concatenate(
        [[1, *mix.stores[0].tokens[mix.stores[0].offsets[d] : mix.stores[0].offsets[d + 1]], 2] for d in order.document]
    )
    assert np.array_equal(stream, expected[:400])


def test_positions_restart_at_each_document_and_no_loss_is_taken_on_what_follows_another() -> None:
    mix = Mix([stored([3, 8, 1, 20, 5], 100)], [1], seed=1, extra=2)
    text = PackedText(mix, mix.order(tokens=400), Borders(bos=1, eos=2), Span(0, 40, 10))
    for i in range(40):
        sequence = text[i]
        starts = sequence["input_ids"] == 1
        starts[0] = True
        assert bool((sequence["position_ids"][starts] == 0).all())
        assert bool((sequence["labels"][starts] == -100).all())
        assert bool((sequence["labels"][~starts] == sequence["input_ids"][~starts]).all())
        assert bool((sequence["position_ids"][1:][~starts[1:]] == sequence["position_ids"][:-1][~starts[1:]] + 1).all())


def test_bytes_and_tokens_are_each_others_inverse() -> None:
    mix = Mix([stored([30, 80, 10], 100)], [1], seed=1, extra=2)
    order = mix.order(tokens=1000)
    for size in (1, 90, 91, 200, 1000):
        assert bytes_at(order, token_at(order, size)) == pytest.approx(size, abs=4)


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
    mix = Mix([stored([20, 30, 8, 25, 5], 100)], [1], seed=1, extra=2)
    schedule = plan(mix, Borders(1, 2), [Phase("one", ["all"], 1e-3, **length)], (4, 10), start_token=0)
    assert schedule.phases[0].steps == steps
    assert len(schedule.dataset(0)) == steps * 4


def test_a_phase_goes_on_where_the_one_before_ended() -> None:
    mix = Mix([stored([20, 30, 8, 25, 5], 100)], [1], seed=1, extra=2)
    two = plan(mix, Borders(1, 2), [Phase("a", ["all"], 1e-3, max_steps=2), Phase("b", ["all"], 1e-3, max_steps=3)], (4, 10), start_token=0)
    alone = plan(mix, Borders(1, 2), [Phase("b", ["all"], 1e-3, max_steps=3)], (4, 10), start_token=80)
    assert [two.dataset(1)[i]["input_ids"].tolist() for i in range(12)] == [alone.dataset(0)[i]["input_ids"].tolist() for i in range(12)]
    assert two.end == alone.end
