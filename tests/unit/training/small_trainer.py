"""A Trainer as pretraining puts it together, on a model of a few thousand numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from azrecipe.distributed.backend import backend_from_env
from azrecipe.training.async_checkpoint import AsyncCheckpointMixin, AsyncCheckpointWriter
from azrecipe.training.bad_step_guard import BadStepGuard, BadStepGuardMixin
from azrecipe.training.monitor import LoopUnits
from azrecipe.training.trainer import NonEmptyParamGroupsMixin

SINGLE = backend_from_env({})
VOCABULARY, LENGTH = 48, 12
POISON = VOCABULARY - 1  # a token whose embedding is NaN after `poison`
UNITS = LoopUnits("phase", tokens_per_step=2 * LENGTH, bytes_at=lambda step: 50 * step, sequence_length=LENGTH)

Row = dict[str, torch.Tensor]


class SmallTrainer(AsyncCheckpointMixin, BadStepGuardMixin, NonEmptyParamGroupsMixin):
    """The mixins that pretraining uses, and its count of predicted tokens."""

    predicted_tokens: Any = 0

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(*args)
        self.predicted_tokens = self.predicted_tokens + count
        return batches, count

    def take_predicted_tokens(self) -> int:
        count, self.predicted_tokens = int(self.predicted_tokens), 0
        return count


def build_model(*, tied: bool = True, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "use_cache": False, **sizes, **changes}))


def build_rows(count: int, *, poisoned: Sequence[int] = (), noise: Sequence[int] = ()) -> list[Row]:
    """Sequences that count upwards, easy to learn; the `noise` ones are random, the `poisoned` ones have the poisoned token."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        tokens = torch.arange(index % 3, index % 3 + LENGTH) % 8
        if index in noise:
            tokens = torch.randint(8, POISON, (LENGTH,), generator=draw)
        if index in poisoned:
            tokens[3] = POISON
        rows.append({"input_ids": tokens, "labels": tokens.clone()})
    return rows


def poison(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Put NaN into one embedding, so that a sequence with that token has a loss of NaN."""
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    return model


def build_trainer(
    folder: Path,
    rows: list[Row],
    *,
    model: LlamaForCausalLM | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    guard: BadStepGuard | None = None,
    background: bool = False,
    **arguments: Any,
) -> SmallTrainer:
    """Build a Trainer on the CPU that reads the rows in order, two a batch; `background` writes checkpoints in a thread."""
    settings = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": 2,
        "max_steps": len(rows) // 2,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        **arguments,
    }
    trainer = SmallTrainer(model or build_model(), TrainingArguments(**settings), train_dataset=rows, callbacks=list(callbacks))
    for callback in callbacks:
        if hasattr(callback, "trainer"):
            callback.trainer = trainer
    if guard is not None:
        trainer.add_callback(guard)
        trainer.guard, guard.trainer = guard, trainer
    trainer.checkpoint_writer = AsyncCheckpointWriter(SINGLE) if background else None
    return trainer


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The tensors are equal bit for bit; NaN equals NaN."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor.nan_to_num(7.0), right[name].nan_to_num(7.0)), name


@dataclass
class AtStep(TrainerCallback):  # type: ignore[misc]
    """Runs an action when a step begins or ends, counted from 1."""

    step: int
    action: Callable[[], None]
    begin: bool = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.begin and state.global_step + 1 == self.step:
            self.action()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.begin and state.global_step == self.step:
            self.action()
