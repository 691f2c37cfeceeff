"""Stage sft: LoRA on conversations, loss on what the assistant says, one merged model at the end and the adapter beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState

from azrecipe.errors import CommandError
from azrecipe.parts import chat, checkpoint, liger, model, optimizers, profiling, run_dir, training, vocabulary
from azrecipe.parts.backend import Backend, check_context
from azrecipe.parts.files import read_json, whole_folder
from azrecipe.parts.lora import lora_config, merged
from azrecipe.parts.run_dir import connect
from azrecipe.parts.sources import Inputs
from azrecipe.parts.watching import Meter, say
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Sft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Load, check every conversation, train the adapter, merge, measure, save."""
    config: Sft = recipe.config
    place = run_dir.locate(recipe, runs_dir, backend.main)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    training.check(config.training, backend)
    check_context(backend.context, recipe)
    checkpoint.check_readable(place.checkpoints, backend)
    optimizers.check(optimizers.named(config))
    base = inputs.folder(config.model, "model")
    sources = [inputs.located(source, "data", "datasets", i) for i, source in enumerate(config.data.datasets)]
    conversations = [messages for source in sources for messages in chat.read(source)]
    run_dir.check_same(recipe, place, inputs.found)
    tokenizer = vocabulary.load_tokenizer(base, config.model.revision)
    if config.training.assistant_only_loss or config.chat_template != "keep" or tokenizer.chat_template is None:
        chat.apply_template(tokenizer, config.chat_template)
    train, held_out, data = _examples(config, tokenizer, conversations)
    profiling.check(recipe, {"sft": _steps(config, train)}, backend.main)
    net = model.load_model(base, config.training.precision, config.model.attn_implementation, config.model.revision)
    model.check_sizes(net, tokenizer, base)
    if config.training.use_liger_kernel:
        liger.check(recipe, net.config.model_type)
    adapter = lora_config(config.lora, net)

    with run_dir.opened(recipe, place, inputs.found):
        say(f"  {data['train']:,} conversations to train on, {data['held_out']:,} held out, {data['duplicates']:,} duplicates and {data['dropped']:,} "
            f"without a trained token left out, {data['truncated']:,} cut to {config.data.max_length} tokens", backend.main)  # fmt: skip
        place.need(3 * 4 * model.count(net), "the merged model")
        device = connect(place)
        before = chat.loss(net.to(device), held_out, config.training.per_device_eval_batch_size) if backend.main else None
        happened = _train(recipe, place, backend, (net, tokenizer, adapter), (train, held_out))
        if backend.main:
            whole = merged(base, place.path / "adapter", config.training.precision, config.model.revision)
            _stop_at_end_of_turn(whole, tokenizer)
            model.save_model(whole, tokenizer, place.final)
            after = chat.loss(whole.to(device), held_out, config.training.per_device_eval_batch_size)
            place.finish(
                {
                    "stage": "sft",
                    "parameters": model.count(whole),
                    "data": data,
                    "training": happened,
                    "held_out_loss": {"before": before and round(before, 5), "after": after and round(after, 5)},
                    "definitions": {
                        "held_out_loss": "mean -ln p a trained token of the held-out conversations; comparable within one tokenizer only"
                    },
                }
            )
        PartialState().wait_for_everyone()
    return read_json(place.path / "result.json") or {}


def _examples(
    config: Sft, tokenizer: PreTrainedTokenizerBase, conversations: list[chat.Messages]
) -> tuple[list[chat.Example], list[chat.Example], dict[str, int]]:
    """Tokenised training and held-out conversations, and what was counted on the way."""
    train, held, duplicates = chat.split(conversations, config.data.validation.held_out.fraction)
    only = config.training.assistant_only_loss
    examples = {}
    dropped = truncated = 0
    for side, rows in (("train", train), ("held", held)):
        made = [chat.tokenize(tokenizer, messages, config.data.max_length, only) for messages in rows]
        truncated += sum(example.cut for example in made)
        examples[side] = [example for example in made if example.trained]
        dropped += len(made) - len(examples[side])
    if not examples["train"]:
        raise CommandError(
            f"no conversation has a trained token left within data.max_length = {config.data.max_length}: raise it, or check the chat template"
        )
    counts = {
        "conversations": len(conversations),
        "train": len(examples["train"]),
        "held_out": len(examples["held"]),
        "duplicates": duplicates,
        "dropped": dropped,
        "truncated": truncated,
        "trained_tokens": sum(example.trained for example in examples["train"]),
    }
    return examples["train"], examples["held"], counts


def _steps(config: Sft, train: list[chat.Example]) -> int:
    if config.training.max_steps is not None:
        return config.training.max_steps
    assert config.training.num_train_epochs is not None
    return math.ceil(len(train) * config.training.num_train_epochs / config.training.global_batch_size)


def order(rows: int, needed: int, seed: int) -> list[int]:
    """Which row comes when: pass after pass, each in an order of its own; the same for every number of processes."""
    passes = [np.random.Generator(np.random.PCG64([seed, i])).permutation(rows) for i in range(math.ceil(needed / rows))]
    return [int(i) for i in np.concatenate(passes)[:needed]]


def _train(
    recipe: Recipe, place: run_dir.RunDir, backend: Backend, subject: tuple[PreTrainedModel, PreTrainedTokenizerBase, Any],
    examples: tuple[list[chat.Example], list[chat.Example]],
) -> dict[str, Any]:  # fmt: skip
    """Train the adapter with TRL's SFTTrainer and save it in adapter/."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    config: Sft = recipe.config
    net, tokenizer, adapter = subject
    train, held_out = examples
    per_step, steps = config.training.global_batch_size, _steps(config, train)
    loop = training.Loop("sft", place.path, place.checkpoints, steps, config.training.learning_rate, recipe.config.seed,
                         config.training.profile)  # fmt: skip
    arguments = training.arguments(config.training, loop, backend)
    if not held_out:
        arguments |= {"eval_strategy": "no", "eval_steps": None}
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in train]
    held = [{"input_ids": e.input_ids, "labels": e.labels} for e in held_out]
    lengths = [len(e.input_ids) for e in train]
    chosen = order(len(rows), steps * per_step, recipe.config.seed)
    tokens = np.concatenate([[0], np.cumsum([lengths[i] for i in chosen])])

    class AdapterTrainer(training.FilledGroups, SFTTrainer):  # type: ignore[misc]
        """TRL's trainer, imported here because it is heavy."""

    def make(callbacks: list[Any]) -> Any:
        return AdapterTrainer(
            model=net, processing_class=tokenizer, peft_config=adapter, callbacks=callbacks,
            train_dataset=Dataset.from_list(rows).select(chosen), eval_dataset=Dataset.from_list(held) if held else None,
            args=training.checked(
                SFTConfig, **arguments, max_length=None, gradient_checkpointing=None, train_sampling_strategy="sequential", shuffle_dataset=False,
            ),
        )  # fmt: skip

    meter = Meter("sft", round(float(tokens[-1]) / steps), lambda _step: 0, length=float(np.mean(lengths)))
    trainer, happened = training.train(make, loop, meter, backend, config.training)
    state = training.whole_state(trainer, backend)
    if backend.main:
        with whole_folder(place.path / "adapter") as aside:
            training.unwrapped(trainer).save_pretrained(aside, state_dict=state)
    trainer.accelerator.wait_for_everyone()
    return happened | {"epochs": round(steps * per_step / len(rows), 3), "tokens": int(tokens[-1])}


def _stop_at_end_of_turn(net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the tokenizer's EOS (the end of a turn) and at whatever ended it before."""
    previous = net.generation_config.eos_token_id
    ends = previous if isinstance(previous, list) else [] if previous is None else [previous]
    net.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
    net.generation_config.pad_token_id = tokenizer.pad_token_id
    net.config.eos_token_id = net.generation_config.eos_token_id
    net.config.pad_token_id = tokenizer.pad_token_id
