"""Runs that are killed: what is left is whole or not there, and going on gives the weights of a run that never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from azrecipe.training.checkpoints import MARKER, list_complete
from tests.small import Project, assert_same_weights, in_small_disk


def step(run: Path) -> int:
    """Lines of metrics so far: steps logged."""
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_rerun_ends_in_the_same_weights(small: Project, finished: Project, number: int, code: int) -> None:
    assert small.interrupt("cpt", lambda run: step(run) >= 10, number) == code
    status = small.status("cpt")
    assert (status["state"], status["exit_code"]) == ("interrupted", code)
    assert not (small.path("cpt") / "final").exists()
    assert not (small.path("cpt") / "result.json").exists()
    saved = list_complete(small.path("cpt") / "checkpoints" / "full")
    assert saved
    printed = small.run("cpt")
    assert f"going on from {saved[-1].relative_to(small.folder)}" in printed
    assert_same_weights(small.path("cpt") / "final", finished.path("cpt") / "final")
    assert small.losses("cpt") == finished.losses("cpt")


def test_kill_9_at_random_moments_never_changes_the_result(small: Project, finished: Project) -> None:
    """Any moment: while starting, training, writing a checkpoint, measuring, or saving the model of a phase."""
    choose = random.Random(20)
    begun = time.monotonic()
    shutil.copytree(small.folder / "runs", small.folder / "whole")
    small.run("cpt", runs="whole")
    seconds = time.monotonic() - begun
    for _ in range(6):
        until = time.monotonic() + choose.uniform(0.1, 1.0) * seconds
        small.interrupt("cpt", lambda _run, until=until: time.monotonic() > until, signal.SIGKILL)
        for checkpoint in (small.path("cpt") / "checkpoints").glob("*/checkpoint-*"):
            marked = (checkpoint / MARKER).exists()
            assert not marked or checkpoint in list_complete(checkpoint.parent)
        if (small.path("cpt") / "result.json").exists():
            break
    small.run("cpt")
    assert_same_weights(small.path("cpt") / "final", finished.path("cpt") / "final")
    assert small.losses("cpt") == finished.losses("cpt")


def test_kill_9_while_a_checkpoint_is_written_uses_the_one_before(small: Project, finished: Project) -> None:
    def torn(run: Path) -> bool:
        return any(not (folder / MARKER).exists() for folder in run.glob("checkpoints/full/checkpoint-*"))

    assert small.interrupt("cpt", torn, signal.SIGKILL) == -signal.SIGKILL
    small.run("cpt")
    assert_same_weights(small.path("cpt") / "final", finished.path("cpt") / "final")


@pytest.mark.parametrize("damage", ["short", "missing", "marker"])
def test_a_torn_newest_checkpoint_is_passed_over(small: Project, finished: Project, damage: str) -> None:
    assert small.interrupt("cpt", lambda run: (run / "checkpoints/full/checkpoint-8" / MARKER).exists(), signal.SIGKILL) == -signal.SIGKILL
    found = list_complete(small.path("cpt") / "checkpoints" / "full")
    newest = found[-1]
    if damage == "short":
        with (newest / "optimizer.pt").open("r+b") as file:
            file.truncate(100)
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    else:
        (newest / MARKER).write_text('{"model.saf')
    printed = small.run("cpt")
    assert f"going on from {found[-2].relative_to(small.folder)}" in printed
    assert_same_weights(small.path("cpt") / "final", finished.path("cpt") / "final")


def test_sft_goes_on_exactly_dropout_included(small: Project, finished: Project) -> None:
    shutil.copytree(finished.path("cpt"), small.path("cpt"))
    assert small.interrupt("sft", lambda run: step(run) >= 5, signal.SIGKILL) == -signal.SIGKILL
    printed = small.run("sft")
    assert "going on from" in printed
    assert_same_weights(small.path("sft") / "final", finished.path("sft") / "final")


def test_a_killed_pipeline_goes_on_with_the_step_that_it_was_in(small: Project, finished: Project) -> None:
    assert small.interrupt("pipeline", lambda _: step(small.path("cpt")) >= 6, signal.SIGKILL) == -signal.SIGKILL
    printed = small.run("pipeline")
    assert printed.count("already complete") == 2  # base and tokenizer
    assert_same_weights(small.path("sft") / "final", finished.path("sft") / "final")
    mine, theirs = small.result("evaluate")["models"], finished.result("evaluate")["models"]
    assert {n: m["bpb"] for n, m in mine.items()} == {n: m["bpb"] for n, m in theirs.items()}


def test_save_total_limit_keeps_so_many_whole_checkpoints(small: Project) -> None:
    small.run("cpt", "--set", "training.save_steps=2", "--set", "training.save_total_limit=2")
    folder = small.path("cpt") / "checkpoints" / "full"
    assert [c.name for c in list_complete(folder)] == ["checkpoint-14", "checkpoint-16"]
    assert len(list(folder.iterdir())) == 2


def test_a_metrics_line_that_a_crash_tore_is_dropped(small: Project, finished: Project) -> None:
    assert small.interrupt("cpt", lambda run: step(run) >= 14, signal.SIGKILL) == -signal.SIGKILL
    with (small.path("cpt") / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "full", "step": 15, "lo')
    small.run("cpt")
    lines = [json.loads(line) for line in (small.path("cpt") / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("embeddings", n) for n in range(1, 9)] + [
        ("full", n) for n in range(1, 17)
    ]


def test_a_full_disk_stops_the_run_in_words_with_the_last_checkpoint_kept(small: Project) -> None:
    shutil.move(small.folder / "runs", small.folder / "seed")
    used = sum(f.stat().st_size for f in (small.folder / "seed").rglob("*") if f.is_file())
    command = small.command(
        "cpt", "--set", "training.save_steps=1", "--set", "training.save_total_limit=2", "--set", "phases[1].max_steps=500"
    )
    # there was room when the run began, and something else takes it while it trains
    fill = "until ls runs/small/cpt/checkpoints/full/*/COMPLETE.json; do sleep 0.02; done; cat /dev/zero > runs/filler"
    done = in_small_disk(command, small.folder, "runs", used + 20_000_000, fill)
    assert done.code == 3, done.err
    assert "disk is full" in done.err
    assert "Traceback" not in done.err
    kept = small.folder / "kept" / "small" / "cpt"
    assert not (kept / "final").exists()
    assert not (kept / "result.json").exists()
    assert list(kept.glob("checkpoints/*/*/" + MARKER))


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(small: Project) -> None:
    shutil.move(small.folder / "runs", small.folder / "seed")
    used = sum(f.stat().st_size for f in (small.folder / "seed").rglob("*") if f.is_file())
    done = in_small_disk(small.command("cpt"), small.folder, "runs", used + 400_000)
    assert done.code == 3, done.err
    assert "of disk" in done.err or "disk is full" in done.err
    assert "Traceback" not in done.err


def test_a_cache_that_was_being_built_is_built_again(small: Project, finished: Project) -> None:
    small.run("phase1")  # fills the cache
    cache = small.folder / "runs" / ".cache"
    for whole in [path for path in cache.iterdir() if path.is_dir()]:
        dead = subprocess.Popen(["true"])
        dead.wait()
        stored = (whole / "documents.bin").exists()
        left = f".{whole.name}.partial" if stored else f".{whole.name}.{socket.gethostname()}.{dead.pid}.tmp"
        torn = whole.with_name(left)  # as a killed process leaves it
        shutil.move(whole, torn)
        (torn / "documents.bin").unlink(missing_ok=True)
    small.run("cpt")
    assert not list(cache.glob(".*.tmp")) + list(cache.glob(".*.partial"))
    assert_same_weights(small.path("cpt") / "final", finished.path("cpt") / "final")


def test_two_processes_in_one_run_directory_the_second_is_refused(small: Project) -> None:
    long = ("--set", "phases[1].max_steps=2000")
    first = small.started("cpt", *long)
    try:
        while first.poll() is None and step(small.path("cpt")) < 1:
            time.sleep(0.01)
        assert "another process is running this recipe" in small.run("cpt", *long, code=3)
        assert first.poll() is None
        assert small.status("cpt")["state"] == "running"
    finally:
        first.send(signal.SIGKILL)
        first.wait()
