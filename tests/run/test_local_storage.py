"""Machines that do not share storage: two launches on this one, each with a run directory of its own, and the place where both are uploaded."""

from __future__ import annotations

import filecmp
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from azrecipe.pipeline.launch_command import resolve_accelerate_config
from azrecipe.training.checkpoints import MARKER, get_step, list_complete
from azrecipe.utils.atomic_files import list_file_sizes, read_json
from tests.conftest import write
from tests.run.test_backends import assert_same_training
from tests.small import Project, Started, assert_same_weights, copied

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
KEPT = ("--set", "training.save_total_limit=2")
CONFIGS = ("ddp", "fsdp")
RUN = Path("small") / "cpt"


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@dataclass
class Machines:
    """Two machines: one/runs and two/runs, their caches beside them, and what they printed."""

    project: Project
    given: dict[str, int] = field(default_factory=dict)  # when what was copied to them had been written

    @property
    def folders(self) -> list[Path]:
        return [self.project.folder / name for name in ("one", "two")]

    @property
    def runs(self) -> list[Path]:
        """Each machine's run directory of cpt."""
        return [folder / "runs" / RUN for folder in self.folders]

    @property
    def printed(self) -> str:
        return "".join((folder / "printed.txt").read_text() for folder in self.folders)

    def started(self, config: str, *arguments: str, processes: int = 1) -> list[Started]:
        """Begin cpt on both, as a cluster does: the same launch on each, its rank apart."""
        port, begun = free_port(), []
        for rank, folder in enumerate(self.folders):
            for name in ("base", "tokenizer"):
                shutil.copytree(self.project.path(name), folder / "runs" / "small" / name, dirs_exist_ok=True)
            launcher = ("-m", "azrecipe.pipeline.accelerate_launcher", "--config_file", str(resolve_accelerate_config(config)), "--num_machines", "2",
                        "--num_processes", str(2 * processes), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                        "--main_process_port", port)  # fmt: skip
            command = self.project.command("cpt", *KEPT, *arguments, runs=str(folder / "runs"), launcher=launcher)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AZRECIPE_STORAGE", "local")
                patch.setenv("AZRECIPE_CACHE", str(folder / "cache"))
                patch.setenv("AZRECIPE_TENSORBOARD", str(folder / "board"))
                begun.append(Started(command, self.project.folder, out=folder / "printed.txt", err=folder / "printed.txt"))
        return begun

    def run(self, config: str, *arguments: str, processes: int = 1, code: int = 0) -> str:
        """Run cpt on both to its end; returns what they printed."""
        for folder in self.folders:
            (folder / "printed.txt").unlink(missing_ok=True)
        codes = [machine.wait() for machine in self.started(config, *arguments, processes=processes)]
        assert codes == [code, code], self.printed
        return self.printed

    def stop(self, config: str, number: int, when: Callable[[Path], bool]) -> None:
        """Start cpt and send a signal to both machines once `when(the first one's run directory)` holds."""
        machines = self.started(config)
        while all(machine.poll() is None for machine in machines) and not when(self.runs[0]):
            time.sleep(0.002)
        assert all(machine.poll() is None for machine in machines), self.printed
        for machine in machines:
            if number == signal.SIGKILL:
                for process in psutil.Process(machine.pid).children(recursive=True):
                    process.kill()
            machine.send(number)
        for machine in machines:
            machine.wait()

    def uploaded(self) -> Path:
        """What the common place holds: what each has written; one name never stands for two contents."""
        there = self.project.folder / "uploaded"
        for run in self.runs:
            for name in list_file_sizes(run):
                if (there / name).exists():
                    if (run / name).stat().st_mtime_ns == self.given.get(name):
                        continue
                    assert filecmp.cmp(run / name, there / name, shallow=False), f"{name} differs between the machines"
                (there / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(run / name, there / name)
        return there

    def give_back(self, uploaded: Path) -> None:
        """New machines, to which what was uploaded is copied."""
        self.given = {name: (uploaded / name).stat().st_mtime_ns for name in list_file_sizes(uploaded)}
        for folder, run in zip(self.folders, self.runs, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(uploaded, run)


def steps(run: Path, phase: str = "full") -> list[int]:
    """The steps of a phase's checkpoint folders."""
    return sorted(get_step(found) for found in (run / "checkpoints" / phase).glob("checkpoint-*"))


@pytest.fixture(scope="module", params=CONFIGS)
def shared(request: pytest.FixtureRequest, finished: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Project]:
    """A backend, and the run of two processes that share a directory and were left alone. Only read it."""
    project = copied(finished, tmp_path_factory.mktemp("shared"))
    project.run("cpt", *KEPT, "--accelerate-config", request.param, "--num-processes", "2")
    return request.param, project


@pytest.fixture(scope="module")
def stopped(shared: tuple[str, Project], finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was uploaded of a run on two machines that ended in its second phase: by a signal, or (FSDP) without one. Only read it."""
    config, _ = shared
    machines = Machines(copied(finished, tmp_path_factory.mktemp("stopped")))
    number = signal.SIGTERM if config == "ddp" else signal.SIGKILL
    machines.stop(config, number, lambda run: (run / "checkpoints" / "full" / "checkpoint-8" / MARKER).exists())
    return machines.uploaded()


@pytest.fixture
def machines(finished: Project, tmp_path: Path) -> Machines:
    return Machines(copied(finished, tmp_path))


def test_two_machines_train_what_two_processes_train_and_each_keeps_its_own_part(shared: tuple[str, Project], machines: Machines) -> None:
    config, alone = shared
    machines.run(config)
    first, second = machines.runs
    assert_same_weights(first / "final", alone.path("cpt") / "final")
    assert read_json(first / "result.json")["bpb"] == alone.result("cpt")["bpb"]
    assert read_json(first / "status.json")["state"] == "complete"
    assert steps(first) == steps(second) == [12, 16]  # the older ones are deleted on both
    shards = {f"{part}_0/__{{}}_0.distcp" for part in ("pytorch_model_fsdp", "optimizer")} if config == "fsdp" else set()
    parts = {"rng_state_{}.pth", *shards}
    for step in (12, 16):
        assert set(list_file_sizes(second)) >= {f"checkpoints/full/checkpoint-{step}/{part.format(1)}" for part in parts}
        sizes = read_json(first / f"checkpoints/full/checkpoint-{step}" / MARKER)
        assert set(sizes) >= {part.format(rank) for part in parts for rank in (0, 1)}
    assert {Path(name).parts[0] for name in list_file_sizes(second)} == {"checkpoints"}
    assert len(list_file_sizes(second)) == 2 * len(parts)
    assert not steps(first, "embeddings") and not steps(second, "embeddings")
    whole = machines.uploaded() / "checkpoints" / "full"
    assert [get_step(found) for found in list_complete(whole)] == [12, 16]
    assert all(not (folder / "runs" / ".cache").exists() and any((folder / "cache").iterdir()) for folder in machines.folders)
    assert not list((machines.folders[1] / "cache").glob("received-*"))
    if config == "fsdp":  # the second machine knows nothing of the run that is complete, and does not wait for it
        shutil.rmtree(second)
        assert "already complete" in machines.run(config)
        assert not second.exists()


@pytest.mark.long
def test_two_machines_with_two_processes_each_train_what_one_process_trains(machines: Machines, finished: Project) -> None:
    machines.run("ddp", "--set", "training.report_to=[tensorboard]", processes=2)
    shutil.copytree(machines.runs[0], machines.project.path("cpt"))
    assert_same_training(machines.project, finished)
    assert steps(machines.runs[0]) == steps(machines.runs[1]) == [12, 16]
    whole = machines.uploaded()
    assert [get_step(found) for found in list_complete(whole / "checkpoints" / "full")] == [12, 16]
    assert not (whole / "tensorboard").exists()
    board = [[file.parent.name for file in sorted((folder / "board").rglob("events*"))] for folder in machines.folders]
    assert board == [["embeddings", "full"], []]


def test_a_run_goes_on_from_what_was_uploaded_and_passes_over_what_is_torn(
    shared: tuple[str, Project], stopped: Path, machines: Machines
) -> None:
    """With FSDP a shard of the newest checkpoint has not reached one of the two machines."""
    config, alone = shared
    machines.give_back(stopped)
    before, newest = list_complete(stopped / "checkpoints" / "full")[-2:]
    if config == "fsdp":
        shard(machines.runs[1] / newest.relative_to(stopped)).unlink()
    printed = machines.run(config)
    assert f"checkpoints/full/{(before if config == 'fsdp' else newest).name}\n" in printed
    assert (f"{newest.name} is incomplete for process 1: going on from {before.name}" in printed) is (config == "fsdp")
    assert_same_weights(machines.runs[0] / "final", alone.path("cpt") / "final")


def test_one_process_goes_on_from_what_two_machines_uploaded(shared: tuple[str, Project], stopped: Path, small: Project) -> None:
    """With FSDP from the checkpoint before the newest: of that a shard was not uploaded."""
    config, alone = shared
    shutil.copytree(stopped, small.path("cpt"))
    folder = small.path("cpt") / "checkpoints" / "full"
    before, newest = list_complete(folder)[-2:]
    if config == "fsdp":
        shard(newest).unlink()
    printed = small.run("cpt", *KEPT, *(("--accelerate-config", "fsdp", "--num-processes", "1") if config == "fsdp" else ()))
    assert f"going on from runs/small/cpt/checkpoints/full/{(before if config == 'fsdp' else newest).name}\n" in printed
    assert_same_training(small, alone)


def shard(checkpoint: Path) -> Path:
    """A file that the second machine wrote of an FSDP checkpoint."""
    return checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp"


def test_machines_that_were_not_given_each_others_files_are_told_so_and_lose_nothing(
    shared: tuple[str, Project], stopped: Path, machines: Machines
) -> None:
    config, _ = shared
    for folder in machines.folders:
        shutil.copytree(stopped.parent / folder.name, folder)
    before = [list_file_sizes(run / "checkpoints") for run in machines.runs]
    assert "is complete on all machines together and not on each" in machines.run(config, code=3)
    assert [list_file_sizes(run / "checkpoints") for run in machines.runs] == before


@pytest.mark.parametrize("shared", ["ddp"], indirect=True)
def test_a_finished_phase_whose_model_was_not_uploaded_whole_goes_on_from_its_last_checkpoint(
    shared: tuple[str, Project], stopped: Path, machines: Machines
) -> None:
    """The note that it is done was uploaded, and the machines were gone before its model was. So it is with the last phase and the run."""
    config, alone = shared
    machines.give_back(stopped)
    for run in machines.runs:
        (run / "phases" / "embeddings" / "model.safetensors").unlink()
        shutil.rmtree(run / "checkpoints" / "full")
    printed = machines.run(config)
    assert "phase embeddings: its model in" in printed and "is incomplete, so the phase is not finished" in printed
    assert "embeddings: going on from" in printed and "checkpoints/embeddings/checkpoint-8\n" in printed
    assert_same_weights(machines.runs[0] / "final", alone.path("cpt") / "final")
    uploaded = machines.uploaded()
    (uploaded / "final" / "model.safetensors").unlink()
    machines.give_back(uploaded)
    printed = machines.run(config)
    assert "phase full: its model in" in printed and "checkpoints/full/checkpoint-16\n" in printed
    assert_same_weights(machines.runs[0] / "final", alone.path("cpt") / "final")


def test_a_machine_that_holds_another_run_is_refused(machines: Machines) -> None:
    write(machines.runs[1] / "status.json", '{"run_id": "another", "state": "interrupted"}')
    assert "of process 1 holds another run than that of process 0" in machines.run("ddp", code=3)


BRING = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from azrecipe.distributed import local_storage
from azrecipe.utils.atomic_files import list_file_sizes
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
cache = Path(f"{folder}_cache")
dist.init_process_group("gloo")
with local_storage.replicate_folder(folder, cache, rank == 0) as here:
    print(here == folder, sorted(list_file_sizes(here).items()), {path.read_bytes()[-3:] for path in here.rglob("*.bin")})
print(list(cache.glob("*")))
"""


@pytest.mark.parametrize("other", ["nothing", "the same", "a full cache"])
def test_what_the_main_process_saved_comes_to_another_machine_or_fails_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """One file is larger than what is sent at a time, one is empty, one lies in a folder."""
    for name, content in {"large.bin": bytes(70 * 2**20) + b"end", "empty": b"", "in/small.bin": b"end"}.items():
        write(tmp_path / "main" / name, content)
    if other == "the same":
        shutil.copytree(tmp_path / "main", tmp_path / "other")
    if other == "a full cache":
        write(tmp_path / "other_cache", "a file stands in its way")
    monkeypatch.setenv("AZRECIPE_STORAGE", "local")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    monkeypatch.setenv("WORLD_SIZE", "2")
    begun = []
    for rank, name in enumerate(("main", "other")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", "0")
        command = [sys.executable, "-c", BRING.replace("sys.argv[1]", repr(name))]
        begun.append(Started(command, tmp_path, out=tmp_path / f"{rank}.txt", err=tmp_path / f"{rank}.txt"))
    codes = [process.wait() for process in begun]
    printed = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    if other == "a full cache":
        assert codes == [1, 1]
        assert "main could not be copied to the machine of process 1: " in printed[0]
        assert "NotADirectoryError" in printed[1]
        return
    assert codes == [0, 0], printed
    files = "[('empty', 0), ('in/small.bin', 3), ('large.bin', 73400323)] {b'end'}\n[]\n"
    assert printed == [f"True {files}", f"{other == 'the same'} {files}"]


@pytest.mark.parametrize("arguments", [(), ("--num-processes", "2")])
def test_an_unknown_storage_is_refused_before_anything_starts(
    small: Project, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> None:
    monkeypatch.setenv("AZRECIPE_STORAGE", "s3")
    assert "AZRECIPE_STORAGE=s3 is not known: shared" in small.run("cpt", *arguments, code=2)
    assert not small.path("cpt").exists()
