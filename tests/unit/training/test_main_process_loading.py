"""A model that one process loads and FSDP shards: the numbers of one that all processes load, without its memory in the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.distributed.backend import Backend
from azrecipe.training.main_process_loading import has_main_process_loading
from tests.conftest import ROOT
from tests.small import called
from tests.unit.training.small_trainer import SINGLE, build_model

WORKER = Path(__file__).with_name("main_process_worker.py")


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here: this run is for the CPU")
    folder = tmp_path_factory.mktemp("loading")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(folder)]
    done = called(command, ROOT)
    assert done.code == 0, done.text
    answers: list[dict[str, Any]] = json.loads(done.out.splitlines()[-1])
    return answers


@pytest.mark.parametrize("case", ["tied True, frozen False", "tied False, frozen True"])
def test_one_process_loads_for_all_and_every_number_is_the_same(answers: list[dict[str, Any]], case: str) -> None:
    """The loss of a sharded copy, three steps' losses and the weights after them, bit for bit; new rows included."""
    for answer in answers:
        assert answer[case] == {"rows": True, "measured": True, "losses": True, "weights": True}


def test_the_other_process_does_not_hold_the_weights(answers: list[dict[str, Any]]) -> None:
    main, other = (answer["memory"] for answer in answers)
    assert main > 50e6
    assert other < 15e6


def test_what_the_main_process_cannot_load_is_an_error_of_every_process(answers: list[dict[str, Any]]) -> None:
    assert [answer["error"] for answer in answers] == ["weights that are NaN"] * 2


def test_who_loads_in_one_process() -> None:
    fsdp, model = Backend("fsdp2", 2, 0), build_model()
    assert has_main_process_loading(fsdp) and has_main_process_loading(fsdp, model)
    assert not has_main_process_loading(SINGLE) and not has_main_process_loading(Backend("zero3", 2, 0))
    assert not has_main_process_loading(Backend("fsdp2", 1, 0))
    model.register_buffer("stored", torch.ones(1))  # Accelerate does not send it
    assert not has_main_process_loading(fsdp, model)
