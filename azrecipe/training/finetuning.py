"""Finetune with TRL's trainers.

The trainers get our rows, in our order, with an adapter or all weights, and learning rates by part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import Trainer

from azrecipe.data.finetuning_examples import FinetuningExamples, FinetuningPlan, join_examples
from azrecipe.data.packing import Collator, get_length_multiple
from azrecipe.distributed.backend import Backend
from azrecipe.modeling import frozen_weights, loading
from azrecipe.recipe.attention_kinds import needs_borders
from azrecipe.recipe.types import SftConfig
from azrecipe.runs.run_dir import RunDir
from azrecipe.tokenization.chat_templates import TokenizedExample
from azrecipe.training import precision
from azrecipe.training import trainer as training_trainer
from azrecipe.training.learning_rates import LearningRatesMixin
from azrecipe.training.monitor import LoopUnits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TunedModel:
    """A model to finetune, with its tokenizer and adapter configuration.

    `adapter` is None where all weights train. `reference_model` is the frozen model of DPO; None where it is the model without its adapter.
    `round_frozen`: whether what is frozen is rounded to bfloat16.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Any = None
    reference_model: PreTrainedModel | None = None
    round_frozen: bool = False


class FinetuningMixin(LearningRatesMixin):
    """A mixin for TRL's trainers: learning rates by part, rounded frozen matrices.

    `round_frozen`: whether frozen matrices are rounded to bfloat16.
    """

    round_frozen = False

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Round what is frozen, then move the model: its adapter is there now."""
        if self.round_frozen:
            frozen_weights.round_matrices(model)
        super()._move_model_to_device(model, device)


def tune_model(
    config: SftConfig, tuned_model: TunedModel, examples: FinetuningExamples, plan: FinetuningPlan, *, run_dir: RunDir, backend: Backend
) -> training_trainer.LoopResult:
    """Train with TRL's SFTTrainer or DPOTrainer.

    Args:
        config: The recipe.
        tuned_model: The model.
        examples: All rows.
        plan: Which rows are in which sequence, and the number of steps.
        run_dir: Where the run is stored.
        backend: How processes share the run.

    Returns:
        The trainer and what the result says of the training.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    loop = training_trainer.LoopConfig(
        name=config.method,
        run_path=run_dir.path,
        checkpoint_dir=run_dir.checkpoints_dir,
        max_steps=plan.steps,
        learning_rate=config.training.learning_rate,
        seed=config.seed,
        gradient_bytes=0 if tuned_model.adapter is not None else loading.count_trainable_bytes(tuned_model.model),
        profile=config.training.profile,
    )
    arguments = training_trainer.build_training_arguments(config.training, loop, backend) | {
        "max_length": None,
        "pad_to_multiple_of": get_length_multiple(tuned_model.model, PartialState().device.type),
        "gradient_checkpointing": None,
        "train_sampling_strategy": "sequential",
        "neftune_noise_alpha": config.training.neftune_noise_alpha,
    }
    if not examples.held_out:
        arguments |= {"eval_strategy": "no", "eval_steps": None}
    tuned_model = replace(tuned_model, round_frozen=precision.rounds_frozen_weights(config.training.precision, backend))
    build_trainer = {"sft": _prepare_sft, "dpo": _prepare_dpo}[config.method](config, tuned_model, examples, plan, arguments)
    lengths = [len(row.example) if config.method == "dpo" else len(row.example.input_ids) for row in examples.train]
    sequence_lengths = [sum(lengths[row] for row in sequence) for sequence in plan.sequences]
    num_tokens = int(np.sum(sequence_lengths))
    units = LoopUnits(config.method, round(num_tokens / plan.steps), lambda _step: 0, sequence_length=float(np.mean(sequence_lengths)))
    result = training_trainer.train_loop(build_trainer, loop, units, backend, config.training)
    sources = examples.summarize_sources(plan)
    details = {
        "epochs": round(len(plan.rows) / len(examples.train), 3),
        "tokens": num_tokens,
        "sequences": len(plan.sequences),
        "sources": sources,
    }
    return result._replace(summary=result.summary | details)


TrainerBuilder = Callable[[list[Any]], Trainer]


def _prepare_sft(
    config: SftConfig, tuned_model: TunedModel, examples: FinetuningExamples, plan: FinetuningPlan, arguments: dict[str, Any]
) -> TrainerBuilder:
    """Prepare the datasets for SFTTrainer; returns what builds the trainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class PartRatesSFTTrainer(FinetuningMixin, SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with learning rates by part.

        It is defined here because TRL is slow to import.
        """

        learning_rates = config.training.learning_rates
        round_frozen = tuned_model.round_frozen

    held_out = examples.held_out
    if config.data.packing:
        packed = [join_examples([examples.train[row].example for row in sequence]) for sequence in plan.sequences]
        train_dataset = Dataset.from_list(packed).with_format("torch")
        eval_dataset = Dataset.from_list([join_examples([e]) for e in held_out]).with_format("torch") if held_out else None
        with_borders = needs_borders(config.model.attn_implementation)
        collator = Collator(tuned_model.tokenizer.pad_token_id, arguments["pad_to_multiple_of"], with_borders)
        collator_arguments = {"data_collator": collator}
        arguments = {**arguments, "dataset_kwargs": {"skip_prepare_dataset": True}}
        tuned_model.model.config.use_cache = False  # or restarting position ids would not separate conversations
    else:
        rows = Dataset.from_list([_to_columns(row.example) for row in examples.train])
        train_dataset, collator_arguments = rows.select([sequence[0] for sequence in plan.sequences]), {}
        eval_dataset = Dataset.from_list([_to_columns(e) for e in held_out]) if held_out else None
    arguments = {**arguments, "shuffle_dataset": False}

    def build_trainer(callbacks: list[Any]) -> Trainer:
        trainer = PartRatesSFTTrainer(
            model=tuned_model.model,
            processing_class=tuned_model.tokenizer,
            peft_config=tuned_model.adapter,
            callbacks=callbacks,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            args=training_trainer.create_training_arguments(SFTConfig, **arguments),
            **collator_arguments,
        )
        add_bias_attribute(trainer.model)
        return trainer

    return build_trainer


def _to_columns(example: TokenizedExample) -> dict[str, list[int]]:
    """Convert an example to the columns of a dataset."""
    return {"input_ids": example.input_ids, "labels": example.labels}


def add_bias_attribute(model: Any) -> None:
    """Give a head the `bias` that TRL reads.

    PEFT's wrapper for trained token rows has only the weight (peft 0.21).
    """
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = getattr(head.original_module, "bias", None)


def _prepare_dpo(
    config: SftConfig, tuned_model: TunedModel, examples: FinetuningExamples, plan: FinetuningPlan, arguments: dict[str, Any]
) -> TrainerBuilder:
    """Prepare the datasets for DPOTrainer; returns what builds the trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class PartRatesDPOTrainer(FinetuningMixin, DPOTrainer):  # type: ignore[misc]
        """DPOTrainer for pairs that are tokens already."""

        learning_rates = config.training.learning_rates
        round_frozen = tuned_model.round_frozen

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    def to_dataset(pairs: Sequence[Any]) -> Any:
        return Dataset.from_list([vars(pair) for pair in pairs]) if pairs else None

    def build_trainer(callbacks: list[Any]) -> Trainer:
        trainer = PartRatesDPOTrainer(
            model=tuned_model.model,
            ref_model=tuned_model.reference_model,
            processing_class=tuned_model.tokenizer,
            peft_config=tuned_model.adapter,
            callbacks=callbacks,
            train_dataset=to_dataset([examples.train[sequence[0]].example for sequence in plan.sequences]),
            eval_dataset=to_dataset(examples.held_out),
            args=training_trainer.create_training_arguments(
                DPOConfig,
                **arguments,
                beta=config.dpo.beta,
                loss_type=[config.dpo.loss_type],
                label_smoothing=config.dpo.label_smoothing,
                disable_dropout=config.adapter == "none" or config.lora.lora_dropout == 0,
            ),
        )
        add_bias_attribute(trainer.model)
        return trainer

    return build_trainer
