"""The global batch and its split: the same number of sequences a step, whatever the processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azrecipe.distributed.batch_size import BatchSplit, split_batch
from azrecipe.errors import CommandError


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_a_split_is_whole_and_the_largest_below_the_ceiling(share: int, ceiling: int, world_size: int) -> None:
    split = split_batch(share * world_size, ceiling, world_size)
    assert split.per_device * split.accumulation == share
    assert 1 <= split.per_device <= ceiling
    assert not [size for size in range(split.per_device + 1, min(ceiling, share) + 1) if share % size == 0]


def test_published_batches_are_split_as_expected() -> None:
    assert split_batch(224, 14, 8) == BatchSplit(14, 2)
    assert split_batch(224, 14, 1) == BatchSplit(14, 16)
    assert split_batch(7, 4, 1) == BatchSplit(1, 7)  # a prime number of sequences


def test_processes_that_do_not_divide_the_batch_are_refused_with_some_that_do() -> None:
    with pytest.raises(CommandError) as error:
        split_batch(224, 14, 6)
    assert "training.global_batch_size = 224 does not divide over 6 processes" in str(error.value)
    assert "Numbers of processes that do: 1, 2, 4, 7, 8; or set a multiple of 6" in str(error.value)
