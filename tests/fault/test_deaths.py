"""Processes that are killed, lost or signalled one by one: what ends, what is saved, and what is said of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from azrecipe.training.checkpoints import list_complete
from tests.fault.test_kills import step
from tests.small import Project, Started

TWO = ("--num-processes", "2", "--set", "phases[0].max_steps=2000", "--set", "training.save_steps=1000")


class Launch:
    """A run of two processes that trains until something ends it."""

    def __init__(self, project: Project, *arguments: str, recipe: str = "cpt") -> None:
        self.project, self.printed = project, project.folder / "printed.txt"
        self.printed.unlink(missing_ok=True)
        self.lines = step(project.path("cpt"))
        self.process: Started = project.started(recipe, *TWO, *arguments, printed=self.printed)
        self.parent = psutil.Process(self.process.pid)
        self.wait_for(lambda: step(project.path("cpt")) >= self.lines + 3)
        self.launcher = self.parent.children()[0]
        self.workers = sorted(self.launcher.children(), key=lambda process: process.pid)  # in the order of ranks

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < until, self.text
            time.sleep(0.01)

    @property
    def text(self) -> str:
        return self.printed.read_text(errors="replace")

    def end(self) -> int:
        """Its exit code; nothing of it runs any longer."""
        code = self.process.wait()
        psutil.wait_procs([self.launcher, *self.workers], timeout=60)
        assert not [process for process in (self.launcher, *self.workers) if is_alive(process)], self.text
        return code


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def saved_steps(project: Project) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in list_complete(project.path("cpt") / "checkpoints" / "embeddings")]


def test_a_killed_rank_is_named(small: Project) -> None:
    launch = Launch(small)
    launch.workers[1].send_signal(signal.SIGKILL)
    assert launch.end() == 137, launch.text
    assert "rank 1 was killed by signal 9 (SIGKILL; often the kernel's out-of-memory killer" in launch.text
    assert "checkpoint is saved" not in launch.text
    status = small.status("cpt")
    assert (status["state"], status["exit_code"]) == ("failed", 137)
    assert status["message"].startswith("rank 1 was killed by signal 9")
    assert saved_steps(small) == []


@pytest.mark.long
@pytest.mark.parametrize("config", ["ddp", "fsdp"])
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGSEGV), (1, signal.SIGBUS)])
def test_every_deadly_signal_and_rank_is_named(small: Project, config: str, rank: int, number: int) -> None:
    launch = Launch(small, "--accelerate-config", config)
    launch.workers[rank].send_signal(number)
    assert launch.end() == 128 + number, launch.text
    assert f"rank {rank} was killed by signal {number} ({signal.Signals(number).name};" in launch.text
    assert "checkpoint is saved" not in launch.text
    status = small.status("cpt")
    assert (status["state"], status["exit_code"]) == ("failed", 128 + number)
    assert f"rank {rank} was killed" in status["message"]


def test_a_killed_launcher_or_parent_leaves_a_checkpoint_and_no_process(small: Project) -> None:
    launch = Launch(small)
    launch.launcher.send_signal(signal.SIGKILL)
    assert launch.end() == 137, launch.text
    assert "the launcher was killed by signal 9" in launch.text
    assert small.status("cpt")["state"] == "interrupted"
    assert "the process that started this one has ended; a checkpoint is saved" in small.status("cpt")["message"]
    (first,) = saved_steps(small)
    launch = Launch(small)
    assert f"going on from runs/small/cpt/checkpoints/embeddings/checkpoint-{first}" in launch.text
    os.kill(launch.process.pid, signal.SIGKILL)
    assert launch.end() == -signal.SIGKILL
    assert small.status("cpt")["state"] == "interrupted"
    assert saved_steps(small)[-1] > first


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGHUP, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_parent_alone_saves(small: Project, number: int, code: int) -> None:
    launch = Launch(small)
    os.kill(launch.process.pid, number)
    assert launch.end() == code, launch.text
    status = small.status("cpt")
    assert (status["state"], status["exit_code"]) == ("interrupted", code), launch.text
    assert saved_steps(small)


@pytest.mark.long
def test_a_stopped_rank_ends_the_run_after_the_timeout_with_stacks(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stopped process goes on later; else the launcher kills it after 30 s (the long test)."""
    monkeypatch.setenv("AZRECIPE_STEP_TIMEOUT", "3")
    launch = Launch(small)
    launch.workers[1].send_signal(signal.SIGSTOP)
    launch.wait_for(lambda: "AZRECIPE_STEP_TIMEOUT" in launch.text)
    launch.workers[1].send_signal(signal.SIGCONT)
    assert launch.end() == 1, launch.text
    assert "a process of this run did not answer in time (AZRECIPE_STEP_TIMEOUT)" in launch.text
    assert "Traceback" not in launch.text
    assert small.status("cpt")["state"] == "failed"
    assert "training_step" in (small.path("cpt") / "stacks" / "rank-0.txt").read_text()


@pytest.mark.long
def test_a_second_signal_ends_a_run_whose_step_never_ends(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZRECIPE_STOP_TIMEOUT", "2")
    launch = Launch(small)
    launch.workers[1].send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(launch.process.pid, signal.SIGTERM)
    launch.wait_for(lambda: "the training step did not end within" in launch.text)
    launch.workers[1].send_signal(signal.SIGCONT)
    assert launch.end() == 143, launch.text
    status = small.status("cpt")
    assert (status["state"], status["exit_code"]) == ("interrupted", 143)
    assert "ended at once, without a checkpoint. The last complete one is kept; what it was doing is in" in status["message"]
    assert "training_step" in (small.path("cpt") / "stacks" / "rank-0.txt").read_text()
    assert saved_steps(small) == []
