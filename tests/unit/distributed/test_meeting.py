"""Processes of a launch meet before their group starts; each is what a launcher of another machine starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MEMBER = """
import os, sys, time
from azrecipe.distributed import meeting
from azrecipe.errors import AzrecipeError
if sys.argv[1] == "refused":
    meeting.announce_failure("r.yaml:3:4: no such key")
    sys.exit()
if sys.argv[1] == "launcher":
    meeting._connect(0, 30)  # serves the store, as a launcher does
    print("serves", flush=True)
    sys.stdin.read()
    sys.exit()
try:
    meeting.meet_processes()
    print("met")
    sys.stdin.read()
except AzrecipeError as error:
    print(f"{type(error).__name__}: {error}")
"""


class Members:
    """Processes with the environment of one launch."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.common = {
            **os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size),
            "AZRECIPE_START_TIMEOUT": "60",
        }  # fmt: skip
        self.started: list[subprocess.Popen[str]] = []

    def start(self, rank: int, kind: str = "member", **changes: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", MEMBER, kind], env={**self.common, "RANK": str(rank), **changes}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process


@pytest.mark.long
def test_all_meet_and_a_missing_one_is_named() -> None:
    members = Members(2)
    processes = [members.start(rank) for rank in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "met\n"
    for process in processes:
        process.communicate("", timeout=60)
    text = Members(2).start(0, AZRECIPE_START_TIMEOUT="1").communicate("", timeout=120)[0]
    assert text.startswith("RunFailed: process 1 of 2 did not come within 1 s (AZRECIPE_START_TIMEOUT)")
    assert socket.gethostname() in text


@pytest.mark.parametrize("order", [("refused", "member"), pytest.param(("member", "refused"), marks=pytest.mark.long)])
def test_a_refused_process_tells_the_others_why(order: tuple[str, str]) -> None:
    members = Members(2)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    launcher = members.start(0, "launcher")
    assert launcher.stdout is not None and launcher.stdout.readline() == "serves\n"
    processes = {}
    for kind in order:
        processes[kind] = members.start(0 if kind == "refused" else 1, kind, **agent)
        if kind == "refused":
            processes[kind].communicate("", timeout=60)
    text = processes["member"].communicate("", timeout=60)[0]
    launcher.communicate("", timeout=60)
    assert text.startswith("RunFailed: process 0 on ")
    assert "r.yaml:3:4: no such key" in text


@pytest.mark.long
def test_a_launcher_that_is_not_there_is_named() -> None:
    text = Members(2).start(1, AZRECIPE_START_TIMEOUT="1").communicate("", timeout=120)[0]
    assert text.startswith("CannotRun: process 0, or its launcher, was not reached at 127.0.0.1:")
