"""The bad-step guard: its state in checkpoints."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from azrecipe.distributed.backend import backend_from_env
from azrecipe.training.bad_step_guard import BadStepGuard


def build_guard(folder: Path) -> BadStepGuard:
    return BadStepGuard(backend_from_env({}), folder, "phase", lambda _sequence: [])


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
