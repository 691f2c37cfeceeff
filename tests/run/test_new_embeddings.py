"""A run whose new embeddings are composed in a space of their own, its vocabulary padded, as far as the assistant and the table."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch

from tests.small import Project, assert_same_weights, fill, weights

FOCUS = ("--set", "tokenizer.new_embeddings=focus", "--set", "tokenizer.pad_to_multiple_of=64")


@pytest.fixture(scope="module")
def padded(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Each test adds runs of its own to the first one."""
    project = fill(tmp_path_factory.mktemp("padded"))
    for runs in ("runs", "again", "two"):
        for name in ("base", "tokenizer"):
            shutil.copytree(finished.path(name), project.path(name, runs))
    printed = project.run("cpt", *FOCUS)
    assert "48 rows of padding" in printed
    assert "start as focus" in printed
    return project


def test_padding_goes_through_every_stage(padded: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = padded.result("cpt")["vocabulary"]
    assert vocabulary["new_size"] == 400 == vocabulary["copied"] + vocabulary["composed"] + vocabulary["fallback"]
    assert (vocabulary["padding"], vocabulary["method"]) == (48, "focus")
    assert min(vocabulary["composed"], vocabulary["fallback"]) > 0
    assert padded.result("cpt")["bpb"]["new_vocabulary"].keys() == {"target", "english"}
    padded.run("sft")
    padded.run("evaluate")
    for recipe in ("cpt", "sft"):
        model = AutoModelForCausalLM.from_pretrained(padded.path(recipe) / "final")
        tokenizer = AutoTokenizer.from_pretrained(padded.path(recipe) / "final")
        assert (model.config.vocab_size, len(tokenizer)) == (448, 400)
        assert weights(padded.path(recipe) / "final")["model.embed_tokens.weight"].shape == (448, 32)
    evaluated = padded.result("evaluate")["models"]
    assert evaluated["adapted"]["bpb"]["target"]["value"] < evaluated["base"]["bpb"]["target"]["value"]
    assert len(evaluated["assistant"]["samples"]) == 2
    said = tokenizer.decode(model.generate(torch.tensor([[0, 50]]), max_new_tokens=8, do_sample=True, temperature=50.0)[0])
    assert isinstance(said, str)  # a padding row that is drawn has no text, and no error


def test_a_model_that_keeps_its_vocabulary_is_padded_too(padded: Project) -> None:
    padded.run("phase1", *FOCUS)
    padded.run("phase2", "--set", "tokenizer={pad_to_multiple_of: 100}")
    assert padded.result("phase2")["vocabulary"]["padding"] == 100
    assert "new_vocabulary" not in padded.result("phase2")["bpb"]
    assert weights(padded.path("phase2") / "final")["model.embed_tokens.weight"].shape == (500, 32)


def test_killed_once_the_vectors_are_there_it_ends_in_the_same_model(padded: Project) -> None:
    cache = padded.folder / "again" / ".cache"
    code = padded.interrupt("cpt", lambda _: any(cache.glob("vectors-*/meta.json")), signal.SIGKILL, *FOCUS, runs="again")
    assert code == -signal.SIGKILL
    made = {file: file.stat().st_mtime_ns for file in cache.glob("vectors-*/*")}
    padded.run("cpt", *FOCUS, runs="again")
    assert made == {file: file.stat().st_mtime_ns for file in cache.glob("vectors-*/*")}
    assert_same_weights(padded.path("cpt", "again") / "final", padded.path("cpt") / "final")


@pytest.mark.long
def test_two_processes_start_from_the_embeddings_of_one(padded: Project) -> None:
    padded.run("cpt", *FOCUS, "--num-processes", "2", runs="two")
    one, two = (padded.result("cpt", runs) for runs in ("runs", "two"))
    assert one["vocabulary"] == two["vocabulary"]
    assert two["bpb"]["new_vocabulary"] == pytest.approx(one["bpb"]["new_vocabulary"], abs=2e-5)
    assert json.dumps(one["data_end"]) == json.dumps(two["data_end"])
