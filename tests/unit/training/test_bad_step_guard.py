"""The bad-step guard: what it calls bad, what it leaves unchanged, what it writes, and its state in checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from azrecipe.errors import AllProcessesFailed
from azrecipe.training.bad_step_guard import MAX_CONSECUTIVE_SKIPS, MIN_LOSSES, BadStepGuard
from tests.unit.training.small_trainer import SINGLE, assert_equal, build_model, build_rows, build_trainer, copy_weights, poison


def build_guard(folder: Path, *, skip: bool = False, spike_factor: float = math.inf) -> BadStepGuard:
    guard = BadStepGuard(SINGLE, folder, "phase", lambda sequence: [{"document": 100 + sequence}])
    guard.skip_bad_steps, guard.spike_factor = skip, spike_factor
    return guard


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


class Recorder(TrainerCallback):  # type: ignore[misc]
    """The weights and the optimizer's moments after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        self.weights.append(copy_weights(model))
        states = enumerate(optimizer.optimizer.state.values())
        self.moments.append({f"{index}.{key}": value.clone() for index, moments in states for key, value in moments.items()})


class BrokenGradient(TrainerCallback):  # type: ignore[misc]
    """Adds infinity to one gradient in one step, as an overflow in a backward pass does; the loss stays finite."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.handle: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.handle = model.lm_head.weight.register_hook(lambda gradient: gradient + math.inf)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


def test_a_nan_loss_stops_before_a_weight_changes(tmp_path: Path) -> None:
    rows, recorder = build_rows(12, poisoned=[7]), Recorder()
    trainer = build_trainer(tmp_path, rows, model=poison(build_model(tied=False)), callbacks=[recorder], guard=build_guard(tmp_path))
    with pytest.raises(AllProcessesFailed, match="phase: the loss is nan at step 4; its documents are in") as error:
        trainer.train()
    assert "training.on_bad_loss=skip skips such steps" in str(error.value)
    assert len(recorder.weights) == 3
    assert_equal(copy_weights(trainer.model), recorder.weights[-1])
    assert read_lines(tmp_path) == [
        {
            "phase": "phase",
            "step": 4,
            "reason": "the loss is nan",
            "loss": "nan",
            "grad_norm": "nan",
            "batches": [
                {"loss": "nan", "sequences": [{"sequence": n, "documents": [{"document": 100 + n}]} for n in (6, 7)]},
            ],
        }
    ]


def test_a_skipped_step_changes_no_weight_and_no_moment(tmp_path: Path) -> None:
    rows, recorder, guard = build_rows(12, poisoned=[5]), Recorder(), build_guard(tmp_path, skip=True)
    trainer = build_trainer(tmp_path, rows, model=poison(build_model(tied=False)), callbacks=[recorder], guard=guard)
    trainer.train()
    assert guard.skipped_steps == [2]  # counted from 0
    assert_equal(recorder.weights[2], recorder.weights[1])
    assert_equal(recorder.moments[2], recorder.moments[1])
    assert not torch.equal(recorder.weights[3]["lm_head.weight"], recorder.weights[2]["lm_head.weight"])
    assert [moments["0.step"].item() for moments in recorder.moments] == [1, 2, 2, 3, 4, 5]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert losses[2] == pytest.approx(losses[1], abs=1e-4)  # the loss before stands in the log for the skipped step's
    finite = {name: weight for name, weight in trainer.model.state_dict().items() if "embed_tokens" not in name}
    assert all(bool(torch.isfinite(weight).all()) for weight in finite.values())


def test_batches_of_a_step_are_sorted_and_have_their_own_losses(tmp_path: Path) -> None:
    """Two batches of two sequences are one step; the logged loss is the mean over all of them."""
    rows, guard = build_rows(12, poisoned=[6]), build_guard(tmp_path, skip=True)
    model = poison(build_model(tied=False))
    trainer = build_trainer(tmp_path, rows, model=model, guard=guard, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    line = read_lines(tmp_path)[0]
    assert line["step"] == 2
    sequences = [[sequence["sequence"] for sequence in batch["sequences"]] for batch in line["batches"]]
    assert sequences == [[6, 7], [4, 5]]  # the worst first
    assert [batch["loss"] for batch in line["batches"]] == ["nan", pytest.approx(guard.recent_losses[0], rel=0.3)]


def test_an_infinite_gradient_is_a_bad_step_with_a_finite_loss(tmp_path: Path) -> None:
    recorder, guard = Recorder(), build_guard(tmp_path, skip=True)
    trainer = build_trainer(tmp_path, build_rows(8), callbacks=[recorder, BrokenGradient(2)], guard=guard)
    trainer.train()
    assert guard.skipped_steps == [1]
    assert_equal(recorder.weights[1], recorder.weights[0])
    line = read_lines(tmp_path)[0]
    assert line["reason"] == f"the gradient's norm is {line['grad_norm']}" and line["grad_norm"] in ("inf", "nan")
    assert isinstance(line["loss"], float)


def test_a_spike_needs_a_usual_loss_and_a_factor(tmp_path: Path) -> None:
    """Noise before MIN_LOSSES steps defines nothing; after them it is a spike, and only where a factor is set."""
    early, late = MIN_LOSSES - 1, MIN_LOSSES + 2  # steps, counted from 0
    rows = build_rows(2 * (late + 2), noise=[2 * early, 2 * early + 1, 2 * late, 2 * late + 1])
    losses: list[float] = []
    for name, spike_factor, skipped in (("a", 1.3, [late]), ("b", math.inf, [])):
        folder = tmp_path / name
        folder.mkdir()
        guard = build_guard(folder, skip=True, spike_factor=spike_factor)
        build_trainer(folder, rows, guard=guard).train()
        assert guard.skipped_steps == skipped
        assert len(guard.recent_losses) == late + 2 - len(skipped)  # a skipped step's loss is not a usual one
        losses = losses or list(guard.recent_losses)
    line = read_lines(tmp_path / "a")[0]
    mean = sum(losses[:late]) / late
    assert line["reason"] == f"the loss is {line['loss']:.3f}, {line['loss'] / mean:.1f} times the mean of the {late} steps before"
    assert not (tmp_path / "b" / "bad_batches.jsonl").exists()


def test_many_bad_steps_in_a_row_stop_a_run_that_skips(tmp_path: Path) -> None:
    """Four in a row go on, and so do five that are apart; the fifth in a row does not."""
    first_rows = [*range(8), 10, *range(12, 22)]  # bad steps 1 to 4, 6, and 7 to 11
    guard = build_guard(tmp_path, skip=True)
    trainer = build_trainer(tmp_path, build_rows(30, poisoned=first_rows), model=poison(build_model(tied=False)), guard=guard)
    with pytest.raises(AllProcessesFailed, match=rf"\({MAX_CONSECUTIVE_SKIPS} steps in a row\)") as error:
        trainer.train()
    assert "on_bad_loss" not in str(error.value)
    assert guard.skipped_steps == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_resumed_run_judges_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """The spike comes after the resume; without the saved losses nothing would be usual, and it would pass."""
    spike = MIN_LOSSES + 2
    rows, folders = build_rows(2 * (spike + 2), noise=[2 * spike, 2 * spike + 1]), [tmp_path / "whole", tmp_path / "parts"]
    guards = [build_guard(folder, skip=True, spike_factor=1.3) for folder in (*folders, folders[1])]
    for folder in folders:
        folder.mkdir()
    whole = build_trainer(folders[0], rows, guard=guards[0])
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": MIN_LOSSES}
    first = build_trainer(folders[1], rows, guard=guards[1], **saving, max_steps=MIN_LOSSES)
    first.train()
    resumed = build_trainer(folders[1], rows, guard=guards[2], **saving)
    resumed.train(resume_from_checkpoint=str(folders[1] / "checkpoints" / f"checkpoint-{MIN_LOSSES}"))
    assert list(guards[2].recent_losses)[:MIN_LOSSES] == list(guards[1].recent_losses)
    assert guards[0].skipped_steps == guards[2].skipped_steps == [spike]
    assert_equal(copy_weights(resumed.model), copy_weights(whole.model))


def test_checkpoints_have_the_state_under_a_stable_key(tmp_path: Path) -> None:
    """A checkpoint names the state "Guard", whatever the class is called."""
    guard = build_guard(tmp_path)
    guard.recent_losses.extend([3.0, 2.5])
    guard.skipped_steps.append(7)
    state = TrainerState(stateful_callbacks=[guard])
    assert state.stateful_callbacks == {"Guard": {"args": {}, "attributes": {"recent": [3.0, 2.5], "skipped": [7]}}}
    state.global_step = 8
    state.save_to_json(str(tmp_path / "trainer_state.json"))

    resumed = build_guard(tmp_path)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    resumed.on_train_begin(arguments, TrainerState.load_from_json(str(tmp_path / "trainer_state.json")), TrainerControl())
    assert list(resumed.recent_losses) == [3.0, 2.5]
    assert resumed.skipped_steps == [7]
