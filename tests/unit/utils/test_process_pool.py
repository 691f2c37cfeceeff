"""Work on text in processes: the order of one process, little in memory, and processes that die."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from azrecipe.errors import CannotRun
from azrecipe.utils.process_pool import WorkerPool, chunk_texts, count_characters, count_cores
from tests.unit.utils.dying import dies

TEXTS = [letter * size for letter, size in zip("abcdefghij", (3, 1, 4, 1, 5, 9, 2, 6, 5, 3), strict=True)]


def count_lengths(factor: int, texts: list[str]) -> tuple[int, list[int]]:
    """What a worker does: its process, and a number a text."""
    return os.getpid(), [factor * len(text) for text in texts]


def test_chunks_hold_every_text_once_and_in_order() -> None:
    chunks = list(chunk_texts(TEXTS, 5))
    assert [text for chunk in chunks for text in chunk] == TEXTS
    assert all(count_characters(chunk) >= 5 for chunk in chunks[:-1])
    assert all(count_characters(chunk[:-1]) < 5 for chunk in chunks)
    assert list(chunk_texts([], 5)) == []


def test_processes_give_what_one_gives_and_in_its_order() -> None:
    chunks = list(chunk_texts(TEXTS, 4))
    with WorkerPool(1) as alone:
        expected = [numbers for _, numbers in alone.map_chunks(count_lengths, (3,), chunks)]
    with WorkerPool(2, min_characters=1) as pool:
        answers = list(pool.map_chunks(count_lengths, (3,), chunks))
    assert [numbers for _, numbers in answers] == expected
    assert os.getpid() not in {process for process, _ in answers}


def test_little_text_starts_no_process() -> None:
    with WorkerPool(2, min_characters=1000) as pool:
        assert {process for process, _ in pool.map_chunks(count_lengths, (1,), chunk_texts(TEXTS, 4))} == {os.getpid()}
        assert pool.pool is None


def test_few_chunks_are_read_ahead() -> None:
    """The results of a long text come while it is read."""
    read: list[int] = []

    def chunks() -> Iterator[list[str]]:
        for index in range(50):
            read.append(index)
            yield ["x" * 10]

    with WorkerPool(2, min_characters=1) as pool:
        answers = pool.map_chunks(count_lengths, (1,), chunks())
        next(answers)
        assert len(read) <= 5
        answers.close()


def test_a_killed_process_is_an_error_in_words() -> None:
    with WorkerPool(2, min_characters=1) as pool, pytest.raises(CannotRun, match="was killed: most likely there was no memory left"):
        list(pool.map_chunks(dies, (), [["a"], ["b"]]))


def test_cores_are_those_that_this_process_may_use() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("only Linux binds a process to cores")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert count_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert count_cores() == len(before)
