"""Dataclasses of the `training` key, of phases and of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PhaseData:
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    name: str
    trainable_parameters: list[str]
    learning_rate: float
    max_steps: int | None = None
    max_tokens: int | None = None
    max_bytes: int | None = None
    num_train_epochs: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    lr_scheduler_type: str | None = None
    decay_ratio: float | None = None
    min_lr_ratio: float | None = None
    warmup_ratio: float | None = None
    optim: str | None = None
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    max_grad_norm: float | None = None
    data: PhaseData | None = None


@dataclass(frozen=True)
class LigerKernels:
    rope: bool | None = None
    rms_norm: bool | None = None
    swiglu: bool | None = None
    geglu: bool | None = None
    layer_norm: bool | None = None
    cross_entropy: bool | None = None
    fused_linear_cross_entropy: bool | None = None


@dataclass(frozen=True)
class Profile:
    start_step: int
    steps: int


@dataclass(frozen=True)
class ActivationCheckpointing:
    every_n_layers: int


@dataclass(frozen=True)
class Training:
    """The keys of every training stage, named as in TrainingArguments."""

    global_batch_size: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    lr_scheduler_type: str
    decay_ratio: float
    min_lr_ratio: float
    optim: str
    warmup_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    precision: str
    use_liger_kernel: bool
    torch_compile: bool
    activation_checkpointing: bool | ActivationCheckpointing
    sync_each_batch: bool | str
    logging_steps: int
    save_steps: int
    save_total_limit: int
    report_to: list[str]
    trainer_arguments: dict[str, Any]
    eval_steps: int | None = None
    liger_kernel_config: LigerKernels | None = None
    profile: Profile | None = None

    @property
    def checkpoint_every(self) -> int:
        """Activations are recomputed in every so many layers; 0: in none."""
        chosen = self.activation_checkpointing
        return int(chosen) if isinstance(chosen, bool) else chosen.every_n_layers


@dataclass(frozen=True, kw_only=True)
class PretrainTraining(Training):
    on_bad_loss: str
    async_sharded_checkpoints: bool
    loss_spike_factor: float | None = None
    fused_linear_cross_entropy: str | None = None


@dataclass(frozen=True, kw_only=True)
class SftTraining(Training):
    learning_rate: float
    assistant_only_loss: bool
    num_train_epochs: float | None = None
    max_steps: int | None = None
    neftune_noise_alpha: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    r: int
    lora_alpha: int | float
    lora_dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool
    modules_to_save: list[str]
    train_new_tokens: bool


@dataclass(frozen=True)
class Dpo:
    beta: float
    loss_type: str
    label_smoothing: float
