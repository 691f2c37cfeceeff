"""The monitor of a loop: lines of metrics, checkpoints in their order, and signals."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from azrecipe.distributed.backend import Backend
from azrecipe.errors import AllProcessesFailed, Interrupted
from azrecipe.training import checkpoints
from azrecipe.training.monitor import MAX_LOG_HISTORY, LoopUnits, TrainerExtension, TrainingMonitor, to_finite_float, trim_lines
from tests.conftest import ROOT, write
from tests.small import called
from tests.unit.training.small_trainer import LENGTH, SINGLE, UNITS, AtStep, SmallTrainer, build_model, build_rows, build_trainer, poison

WORKER = Path(__file__).with_name("two_processes.py")
SAVING = {"save_strategy": "steps", "save_steps": 2}


class Tracker(TrainerCallback):  # type: ignore[misc]
    """What a tracker after the monitor gets to show."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def run_monitored(folder: Path, *, extra: tuple[TrainerCallback, ...] = (), **arguments: Any) -> SmallTrainer:
    monitor = TrainingMonitor(SINGLE, folder, UNITS, keep_last=2)
    trainer = build_trainer(folder, build_rows(12), callbacks=[monitor, *extra], **arguments)
    with monitor:
        trainer.train()
    monitor.raise_if_interrupted()
    return trainer


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_the_numbers_of_their_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker()
    trainer = run_monitored(tmp_path, extra=(tracker,), logging_steps=2)
    assert isinstance(trainer, TrainerExtension)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line, logged in zip(lines, tracker.logs, strict=True):
        assert line["phase"] == "phase" and line["loss"] == logged["loss"]
        assert line["tokens"] == 2 * LENGTH * line["step"] and line["bytes"] == 50 * line["step"]
        assert line["learning_rate"] == 3e-2 and math.isfinite(line["grad_norm"]) and line["peak_memory_bytes"] > 0
        assert {"phase": "phase", "step": line["step"], **{key: logged[key] for key in line.keys() - {"phase", "step"}}} == line
    # two sequences a step, of which all tokens but the first are predicted, cost loss * tokens nats; 50 bytes a step
    predicted, steps = 2 * (LENGTH - 1), 2
    expected = lines[-1]["loss"] * predicted * steps / (math.log(2) * 50 * steps)
    assert lines[-1]["train_bpb"] == pytest.approx(expected, abs=1e-5)
    printed = capsys.readouterr().err
    assert "phase: 6 steps (single, 1 process, device cpu)" in printed
    last = lines[-1]
    assert (
        f"  phase      6/6  loss {last['loss']:.3f}  BPB {last['train_bpb']:.3f}  lr 3.00e-02  {last['tokens_per_second']:,.0f} tokens/s"
        in printed
    )
    assert printed.rstrip().endswith("0 s left")


def test_tokens_are_counted_by_the_step_or_by_the_data() -> None:
    assert UNITS.count_tokens(3) == 6 * LENGTH
    assert LoopUnits("phase", 100, lambda step: step, tokens_at=lambda step: step**2).count_tokens(3) == 9


def test_words_and_steps_are_rates_of_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations have no bytes and no tokens a step: then a line has steps a second."""
    monitor = TrainingMonitor(SINGLE, tmp_path, LoopUnits("sft", 0, lambda step: 0), 1)
    build_trainer(tmp_path, build_rows(2), callbacks=[monitor]).train()
    assert "train_bpb" not in read_metrics(tmp_path)[0]
    assert "steps/s" in capsys.readouterr().err
    words = LoopUnits("words", 24, lambda step: 0, tokens_per_word=4.0)
    build_trainer(tmp_path, build_rows(2), callbacks=[TrainingMonitor(SINGLE, tmp_path, words, 1)]).train()
    line = read_metrics(tmp_path)[1]
    assert line["target_words_per_second"] == pytest.approx(line["tokens_per_second"] / 4, abs=0.1)


def test_measurements_are_lines_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = TrainingMonitor(SINGLE, tmp_path, UNITS, 1)
    monitor.on_log(None, TrainerState(global_step=4, max_steps=9), TrainerControl(), logs={"eval_target_bpb": 1.25, "eval_en_bpb": 2.5})
    assert read_metrics(tmp_path) == [{"phase": "phase", "step": 4, "eval_target_bpb": 1.25, "eval_en_bpb": 2.5}]
    assert "phase      4/9  bits per byte: target 1.250, en 2.500" in capsys.readouterr().err


def test_other_processes_write_no_lines(tmp_path: Path) -> None:
    monitor = TrainingMonitor(Backend("ddp", 2, 1), tmp_path, UNITS, 1)
    logs = {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0}
    monitor.on_log(None, TrainerState(global_step=1, max_steps=2), TrainerControl(), logs=logs)
    monitor.on_log(None, TrainerState(global_step=1, max_steps=2), TrainerControl(), logs={"eval_target_bpb": 1.25})
    assert not (tmp_path / "metrics.jsonl").exists() and monitor.losses == [2.0]


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    monitor = TrainingMonitor(SINGLE, tmp_path, UNITS, 2)
    rows = build_rows(12, poisoned=[7])
    trainer = build_trainer(tmp_path, rows, model=poison(build_model(tied=False)), callbacks=[monitor], **SAVING)
    with pytest.raises(AllProcessesFailed, match="phase: the loss is nan at step 4"):
        trainer.train()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert checkpoints.find_last_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-2"


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_are_complete_and_the_oldest_go(tmp_path: Path, background: bool) -> None:
    run_monitored(tmp_path, background=background, **SAVING)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.list_complete(folder)] == ["checkpoint-4", "checkpoint-6"]
    assert len(list(folder.iterdir())) == 2


def test_a_checkpoint_holds_few_log_lines(tmp_path: Path) -> None:
    monitor = TrainingMonitor(SINGLE, tmp_path, UNITS, 2)
    state = TrainerState(global_step=1, log_history=[{"step": step} for step in range(MAX_LOG_HISTORY + 20)])
    monitor.on_log(None, state, TrainerControl(), logs={})
    assert [entry["step"] for entry in state.log_history] == [*range(20, MAX_LOG_HISTORY + 20)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_its_step_and_ends_the_run(tmp_path: Path, number: int, code: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    sending = AtStep(3, lambda: os.kill(os.getpid(), number), begin=True)
    with pytest.raises(Interrupted, match="a checkpoint is saved") as error:
        run_monitored(tmp_path, extra=(sending,), save_strategy="steps", save_steps=100)
    assert error.value.exit_code == code
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert [path.name for path in checkpoints.list_complete(tmp_path / "checkpoints")] == ["checkpoint-3"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_processes_stop_after_the_same_step_and_judge_alike(tmp_path: Path) -> None:
    """One of two processes gets the signal, and the loss of NaN: both stop a step later, and both skip. Losses are means over both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), "steps", tmp_path]
    done = called([str(word) for word in command], ROOT)
    assert done.code == 0, done.err
    one, two = json.loads(done.out.splitlines()[-1])  # torch 2.9's gloo prints lines before it
    assert one == two == {"stopped": 4, "signal": signal.SIGTERM, "losses": [1.5, 3.5, 4.5], "skipped": [1]}
    (line,) = [json.loads(text) for text in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    batches = [(batch["loss"], [sequence["sequence"] for sequence in batch["sequences"]]) for batch in line["batches"]]
    assert batches == [("nan", [3]), (2.0, [2])]  # the second step's sequences, each with its own process' loss


def test_a_signal_is_shared_a_step_later_or_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), "signal", tmp_path]
    done = called([str(word) for word in command], ROOT)
    assert done.code == 0, done.err
    one, two = json.loads(done.out.splitlines()[-1])
    assert one == two == {"later": [0, 0, 0, 15], "at once": 15, "after": 0}


def test_numbers_that_json_lacks_become_null() -> None:
    assert [to_finite_float(value) for value in (None, math.nan, math.inf, 2, torch.tensor(1.5))] == [None, None, None, 2.0, 1.5]


def test_lines_after_the_resumed_step_are_dropped_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    trim_lines(file, "two", 1)
    assert not file.exists()
    lines = [json.dumps({"phase": phase, "step": step}) for phase, step in (("one", 1), ("one", 2), ("two", 1), ("two", 2), ("two", 3))]
    write(file, "\n".join([*lines, '{"phase": "two", "st']))
    trim_lines(file, "two", 1)
    assert file.read_text() == "".join(f"{line}\n" for line in lines[:3])
    before = file.stat()
    trim_lines(file, "two", 1)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # nothing to drop, nothing written
