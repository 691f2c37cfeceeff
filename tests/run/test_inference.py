"""A finished assistant is tried: what generate and chat write is what the evaluation measured."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable

import pytest

from tests.conftest import Done
from tests.small import Project

QUESTION = "Bu neçədir: 2 + 2?"


def test_generate_and_chat_answer_as_the_evaluation_did(
    cli: Callable[..., Done], finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = finished.result("evaluate")["models"]["assistant"]["samples"]
    sample = next(sample for sample in samples if sample["prompt"] == QUESTION)
    done = cli("generate", finished.path("sft"), "--prompt", QUESTION, "--max-new-tokens", 12, "--json")
    assert done.code == 0, done.err
    written = json.loads(done.out)
    assert (written["output"], written["tokens"], written["ended"]) == (sample["output"], sample["tokens"], sample["ended"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{QUESTION}\n".encode()), encoding="utf-8"))
    done = cli("chat", finished.path("sft"), "--max-new-tokens", 12)
    assert (done.code, done.out) == (0, sample["output"] + "\n")
    text = next(sample for sample in samples if sample["form"] == "text")
    done = cli("generate", finished.path("sft") / "final", "--text", "--prompt", text["prompt"], "--max-new-tokens", 12)
    assert done.out == text["output"] + "\n"
