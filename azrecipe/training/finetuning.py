"""How TRL's trainers are given our rows, in our order, with an adapter or all weights, and rates of learning by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer

from azrecipe.data.finetuning_examples import Examples, Plan, joined
from azrecipe.data.packing import Collate
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CommandError
from azrecipe.modeling import parameter_groups
from azrecipe.recipe.types import Sft
from azrecipe.runs.run_dir import RunDir
from azrecipe.tokenization.chat_templates import Example
from azrecipe.training import trainer as training_trainer
from azrecipe.training.monitor import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """What is tuned: the model, its tokenizer, the adapter's configuration (None: all weights), and what a preference is held to.

    `reference`: the model as it was, where there is no adapter to be taken away.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Any = None
    reference: PreTrainedModel | None = None


def part_rates(model: torch.nn.Module, rates: Mapping[str, float], trainable: bool = True) -> dict[str, float]:
    """The learning rate of each parameter that a part names; the first part that matches counts.

    Raises CommandError for a part that no parameter is left of, `trainable` ones only if asked.
    """
    found: dict[str, float] = {}
    problems = []
    names = {name: p for name, p in model.named_parameters() if p.requires_grad or not trainable}
    for part, rate in rates.items():
        own = [name for name in parameter_groups.matching(model, part, names) if name not in found]
        if not own:
            shown = "\n  ".join(list(names)[:12])
            problems.append(f"training.learning_rates: {part} matches no parameter that trains. The first that do:\n  {shown}")
        found |= dict.fromkeys(own, rate)
    if problems:
        raise CommandError("\n".join(problems))
    return found


class PartRates(training_trainer.FilledGroups):
    """A trainer whose optimizer has groups with learning rates of their own."""

    learning_rates: Mapping[str, float] = {}

    def create_optimizer(self, *arguments: Any, **more: Any) -> torch.optim.Optimizer:
        """The optimizer, its groups cut by part."""
        optimizer = super().create_optimizer(*arguments, **more)
        if not self.learning_rates:
            return optimizer
        rates = part_rates(self.model, self.learning_rates)
        by_id = {id(p): rates[name] for name, p in self.model.named_parameters() if name in rates}
        groups = []
        for group in optimizer.param_groups:
            for rate in dict.fromkeys(by_id.get(id(p), group["lr"]) for p in group["params"]):
                own = [p for p in group["params"] if by_id.get(id(p), group["lr"]) == rate]
                groups.append({**group, "params": own, "lr": rate})
        groups.sort(key=lambda group: group["lr"] != self.args.learning_rate)  # the first one's rate is what is logged
        optimizer.param_groups[:] = groups
        return optimizer


def tune(config: Sft, where: tuple[RunDir, Backend], subject: Subject, examples: Examples, plan: Plan) -> tuple[Trainer, dict[str, Any]]:
    """Train with TRL's SFTTrainer or DPOTrainer; returns the trainer and what happened."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    place, backend = where
    loop = training_trainer.Loop(
        config.method, place.path, place.checkpoints, plan.steps, config.training.learning_rate, config.seed, config.training.profile
    )
    arguments = training_trainer.arguments(config.training, loop, backend) | {
        "max_length": None, "gradient_checkpointing": None, "train_sampling_strategy": "sequential", "neftune_noise_alpha": config.training.neftune_noise_alpha,
    }  # fmt: skip
    if not examples.held_out:
        arguments |= {"eval_strategy": "no", "eval_steps": None}
    build = {"sft": _sft, "dpo": _dpo}[config.method](config, subject, examples, plan, arguments)
    sizes = [len(row.example) if config.method == "dpo" else len(row.example.input_ids) for row in examples.train]
    per_sequence = [sum(sizes[row] for row in sequence) for sequence in plan.sequences]
    total = int(np.sum(per_sequence))
    meter = Meter(config.method, round(total / plan.steps), lambda _step: 0, length=float(np.mean(per_sequence)))
    trainer, happened = training_trainer.train(build, loop, meter, backend, config.training)
    read = examples.read(plan)
    return trainer, happened | {"epochs": round(len(plan.rows) / len(examples.train), 3), "tokens": total,
                                "sequences": len(plan.sequences), "sources": read}  # fmt: skip


Build = Callable[[list[Any]], Trainer]


def _sft(config: Sft, subject: Subject, examples: Examples, plan: Plan, arguments: dict[str, Any]) -> Build:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Tuner(PartRates, SFTTrainer):  # type: ignore[misc]
        """TRL's trainer, imported here because it is heavy."""

        learning_rates = config.training.learning_rates

    held = examples.held_out
    if config.data.packing:
        parts = [joined([examples.train[row].example for row in sequence]) for sequence in plan.sequences]
        train = Dataset.from_list(parts).with_format("torch")
        held_out = Dataset.from_list([joined([e]) for e in held]).with_format("torch") if held else None
        flat = config.model.attn_implementation.startswith("flash")
        more = {"data_collator": Collate(subject.tokenizer.pad_token_id, flat)}
        arguments = {**arguments, "dataset_kwargs": {"skip_prepare_dataset": True}}
        subject.model.config.use_cache = False  # or position ids that restart would not keep conversations apart
    else:
        rows = Dataset.from_list([_tokens(row.example) for row in examples.train])
        train, more = rows.select([sequence[0] for sequence in plan.sequences]), {}
        held_out = Dataset.from_list([_tokens(e) for e in held]) if held else None
    arguments = {**arguments, "shuffle_dataset": False}

    def make(callbacks: list[Any]) -> Trainer:
        tuner = Tuner(
            model=subject.model, processing_class=subject.tokenizer, peft_config=subject.adapter, callbacks=callbacks,
            train_dataset=train, eval_dataset=held_out, args=training_trainer.checked(SFTConfig, **arguments), **more,
        )  # fmt: skip
        name_bias(tuner.model)
        return tuner

    return make


def _tokens(example: Example) -> dict[str, list[int]]:
    return {"input_ids": example.input_ids, "labels": example.labels}


def name_bias(model: Any) -> None:
    """Give a head whose token rows PEFT trains the `bias` that TRL asks of it (peft 0.21: its wrapper passes on the weight alone)."""
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = getattr(head.original_module, "bias", None)


def _dpo(config: Sft, subject: Subject, examples: Examples, plan: Plan, arguments: dict[str, Any]) -> Build:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Tuner(PartRates, DPOTrainer):  # type: ignore[misc]
        """TRL's trainer on pairs that are tokens already."""

        learning_rates = config.training.learning_rates

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    def rows(pairs: Sequence[Any]) -> Any:
        return Dataset.from_list([vars(pair) for pair in pairs]) if pairs else None

    def make(callbacks: list[Any]) -> Trainer:
        tuner = Tuner(
            model=subject.model, ref_model=subject.reference, processing_class=subject.tokenizer, peft_config=subject.adapter, callbacks=callbacks,
            train_dataset=rows([examples.train[sequence[0]].example for sequence in plan.sequences]), eval_dataset=rows(examples.held_out),
            args=training_trainer.checked(
                DPOConfig, **arguments, beta=config.dpo.beta, loss_type=[config.dpo.loss_type], label_smoothing=config.dpo.label_smoothing,
                disable_dropout=config.adapter == "none" or config.lora.lora_dropout == 0,
            ),
        )  # fmt: skip
        name_bias(tuner.model)
        return tuner

    return make
