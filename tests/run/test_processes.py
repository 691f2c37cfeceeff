"""The same recipe in one process, in two, and by every launcher: one model, one loss curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.utils import shipped_files
from tests.small import Project, pages, weights

DDP = str(shipped_files.locate_root() / "accelerate_configs" / "ddp.yaml")


def test_two_processes_train_the_model_that_one_trains(small: Project, finished: Project) -> None:
    """float32, no dropout; the sum over two processes is taken in another order, hence 2e-6 on a loss near 5."""
    small.run("cpt", "--num-processes", "2")
    one, two = finished.losses("cpt"), small.losses("cpt")
    assert len(one) == len(two) == 24
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 2e-6
    left, right = weights(finished.path("cpt") / "final"), weights(small.path("cpt") / "final")
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-4
    for name, bpb in finished.result("cpt")["bpb"].items():
        assert bpb == pytest.approx(small.result("cpt")["bpb"][name], abs=2e-5)


@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "accelerate.commands.launch"),
        ("-m", "accelerate.commands.launch", "--config_file", DDP, "--num_processes", "2"),
        ("-m", "torch.distributed.run", "--nproc_per_node", "2"),
    ],
    ids=["accelerate", "accelerate-ddp", "torchrun"],
)
def test_every_launcher_gives_the_same_losses(small: Project, finished: Project, launcher: tuple[str, ...]) -> None:
    with pages():
        small.run("phase1", launcher=launcher)
    assert (small.path("phase1") / "report.html").exists()
    assert max(abs(a - b) for a, b in zip(small.losses("phase1"), finished.losses("cpt")[:8], strict=True)) < 2e-6


def test_accumulation_changes_nothing(small: Project, finished: Project) -> None:
    small.run("phase1", "--set", "training.per_device_train_batch_size=1")
    assert max(abs(a - b) for a, b in zip(small.losses("phase1"), finished.losses("cpt")[:8], strict=True)) < 2e-6


def test_sft_in_two_processes_sees_the_same_conversations(small: Project, finished: Project, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.path("cpt"), small.path("cpt"))
    dropout = ("--set", "lora.lora_dropout=0", "--set", "training.max_steps=6")
    small.run("sft", *dropout, runs="runs")
    shutil.move(small.path("sft"), tmp_path / "one")
    small.run("sft", *dropout, "--num-processes", "2")
    one, two = (weights(folder / "final") for folder in (tmp_path / "one", small.path("sft")))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4


def test_processes_that_do_not_fit_the_mesh_are_refused_before_they_start(small: Project) -> None:
    printed = small.run("phase1", "--accelerate-config", "hsdp", "--num-processes", "3", code=2)
    assert "replicates over 2 groups of processes, and 3 do not divide by that" in printed
    assert not small.path("phase1").exists()


def test_a_launcher_that_starts_fewer_processes_than_asked_is_refused(small: Project) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    printed = small.run("phase1", launcher=launcher, code=1)  # accelerate's own code for any failure of a worker
    assert "several processes were asked for and one was started" in printed
    assert not small.path("phase1").exists()


def test_a_finished_two_process_run_is_recognised_by_one(small: Project) -> None:
    small.run("phase1", "--num-processes", "2")
    before = weights(small.path("phase1") / "final")
    assert "already complete" in small.run("phase1")
    assert all(bool((before[key] == value).all()) for key, value in weights(small.path("phase1") / "final").items())


def test_a_refusal_by_all_processes_is_no_interruption(small: Project) -> None:
    printed = small.run("phase2", "--num-processes", "2", code=2)  # phase1.yaml has not been run
    assert printed.count("phase1.yaml, but it has not been run") == 1
    assert "interrupted" not in printed
