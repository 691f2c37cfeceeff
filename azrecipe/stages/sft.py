"""Stage sft: a model tuned on conversations or preferences, by an adapter or as a whole; one plain model at the end, the adapter beside it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from azrecipe.data import finetuning_examples
from azrecipe.data.finetuning_examples import Examples, Plan
from azrecipe.data.inputs import Inputs
from azrecipe.distributed import requirements
from azrecipe.distributed.backend import Backend
from azrecipe.distributed.requirements import check_context
from azrecipe.errors import CommandError
from azrecipe.evaluation import likelihood
from azrecipe.modeling import liger_kernels, loading, lora
from azrecipe.modeling.vocabulary_swap import add_rows
from azrecipe.planning import run_estimate
from azrecipe.planning.model_config import ModelShape
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Sft
from azrecipe.runs import run_dir
from azrecipe.runs.run_dir import connect
from azrecipe.tokenization import chat_templates
from azrecipe.tokenization.tokenizer import load_tokenizer, rows_needed, save_tokenizer
from azrecipe.training import checkpoints, finetuning, profiling
from azrecipe.training import trainer as training_trainer
from azrecipe.training.pretraining import release
from azrecipe.utils.atomic_files import read_json, whole_folder
from azrecipe.utils.console import say
from azrecipe.utils.paths import is_template_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checked:
    """What a run of the recipe works on, all that can be refused without the model's weights being refused already."""

    base: lora.Base
    examples: Examples
    plan: Plan
    new_tokens: list[int]
    shape: ModelShape


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Load, check every row, tune, merge, measure, save."""
    config: Sft = recipe.config
    place = run_dir.locate(recipe, runs_dir, backend.main)
    inputs = Inputs(recipe, runs_dir)

    training_trainer.check(config.training, backend)
    check_context(backend.context, recipe)
    checkpoints.check_readable(place.checkpoints, backend)
    requirements.check_backend(config.adapter, backend)
    extras.check_optimizers(optimizer_settings.named(config))
    requirements.check_sharded(config, backend.fsdp, backend.readers)
    checked = check(recipe, inputs)
    requirements.check_rows(backend, checked.new_tokens if config.adapter != "none" else [], config.lora)
    run_dir.check_same(recipe, place, inputs.found)
    profiling.check(recipe, {config.method: checked.plan.steps}, backend.main)

    with run_dir.opened(recipe, place, inputs.found), run_estimate.explained(place):
        _describe(config, checked, backend)
        run_estimate.foresee(recipe, checked.shape, place, backend)
        device = connect(place, inputs.found)
        base = checked.base
        net = base.load_quantized(config.training.precision) if config.adapter == "qlora" else base.load(config.training.precision)
        place.need(3 * 4 * loading.count(net), "the tuned model")
        before = _measured(config, net, checked, device) if backend.main else {}
        subject = _subject(config, base, net, checked.new_tokens, backend)
        trainer, happened = finetuning.tune(config, (place, backend), subject, checked.examples, checked.plan)
        whole = _save(config, place, (trainer, backend), base)
        del trainer, subject, net
        release()  # before a second model goes to the device
        if whole is not None:
            after = _measured(config, whole, checked, device)
            place.finish(_result(config, loading.count(whole), checked, happened, {"before": before, "after": after}))
        PartialState().wait_for_everyone()
    return read_json(place.path / "result.json") or {}


def check(recipe: Recipe, inputs: Inputs) -> Checked:
    """Read every row and refuse what cannot be trained. Needs no weights and no GPU."""
    config: Sft = recipe.config
    path = inputs.folder(config.model, "model")
    net = loading.skeleton(path, config.model.attn_implementation, config.model.revision)
    tokenizer = load_tokenizer(path, config.model.revision)
    loading.check_sizes(net, tokenizer, path)
    if config.training.use_liger_kernel:
        liger_kernels.check(recipe, net.config.model_type)
    if is_template_file(config.chat_template):
        inputs.found["chat_template"] = hashlib.sha256(Path(config.chat_template).read_bytes()).hexdigest()
    sources = [inputs.located(source, "data", "datasets", i) for i, source in enumerate(config.data.datasets)]
    rows = finetuning_examples.read(config, sources)
    try:
        new = chat_templates.apply_template(
            tokenizer,
            config.chat_template,
            config.training.assistant_only_loss and config.method == "sft",  # a preference is its answers, whatever is marked
            finetuning_examples.messages_of(rows[0][0]),
        )
    except CommandError as error:
        raise recipe.problem(str(error), "chat_template") from None
    limit = getattr(net.config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        message = f"data.max_length = {config.data.max_length:,} is more than the model's {limit:,} positions"
        raise recipe.problem(message, "data", "max_length")
    wide = max(int(net.get_input_embeddings().weight.shape[0]), rows_needed(tokenizer))
    shape = run_estimate.shape(net.config, wide, len(new))
    _check_parts(recipe, net, new if config.lora.train_new_tokens else [], tokenizer)
    made = finetuning_examples.examples(config, tokenizer, rows)
    return Checked(lora.Base(path, config.model, tokenizer), made, finetuning_examples.plan(config, made.train), new, shape)


def _check_parts(recipe: Recipe, net: PreTrainedModel, new: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an adapter that this model cannot have, and rates of learning for parts that it has not."""
    config: Sft = recipe.config
    adapted: Any = net
    if config.adapter != "none":
        from peft import get_peft_model

        try:
            with torch.device("meta"):
                add_rows(net, rows_needed(tokenizer))
            adapter = lora.lora_config(config.lora, net, new)
        except CommandError as error:
            raise recipe.problem(str(error), "lora") from None
        with torch.device("meta"):
            adapted = get_peft_model(net, adapter, low_cpu_mem_usage=True)
    try:
        finetuning.part_rates(adapted, config.training.learning_rates)
    except CommandError as error:
        raise recipe.problem(str(error), "training", "learning_rates") from None


def _describe(config: Sft, checked: Checked, backend: Backend) -> None:
    counts, plan = checked.examples.counts, checked.plan
    kind = "pairs" if config.method == "dpo" else "conversations"
    dropped = f"longer than {config.data.max_length} tokens" if config.method == "dpo" else "without a trained token"
    packed = f", in {len(plan.sequences):,} sequences" if config.data.packing else ""
    say(f"  {counts['train']:,} {kind} to train on{packed}, {counts['held_out']:,} held out, {counts['duplicates']:,} duplicates and {counts['dropped']:,} "
        f"{dropped} left out, {counts['truncated']:,} cut to {config.data.max_length} tokens", backend.main)  # fmt: skip
    if checked.new_tokens:
        names = ", ".join(checked.base.tokenizer.convert_ids_to_tokens(checked.new_tokens))
        say(f"  new tokens: {names}", backend.main)


def _subject(config: Sft, base: lora.Base, net: PreTrainedModel, new: Sequence[int], backend: Backend) -> finetuning.Subject:
    """The model with what trains of it; token rows that no training has touched train beside an adapter."""
    if config.adapter == "none":
        reference = base.load(config.training.precision) if config.method == "dpo" else None
        return finetuning.Subject(net, base.tokenizer, None, reference)
    shipped = chat_templates.SHIPPED.get(config.chat_template)
    ids = [i for i in base.tokenizer.convert_tokens_to_ids(list(shipped.tokens)) if i not in new] if shipped else []
    rows = [*new, *(lora.untrained(net, ids) if ids else [])]
    if rows and (backend.sharded or not config.lora.train_new_tokens):
        names = ", ".join(base.tokenizer.convert_ids_to_tokens(rows))
        why = "beside a sharded backend they cannot train" if backend.sharded else "lora.train_new_tokens is false"
        say(
            f"  warning: no training has touched the rows of {names}, and {why}: what stands on them means nothing to the model",
            backend.main,
        )
        rows = []
    return finetuning.Subject(net, base.tokenizer, lora.lora_config(config.lora, net, rows))


def _save(config: Sft, place: run_dir.RunDir, ran: tuple[Any, Backend], base: lora.Base) -> PreTrainedModel | None:
    """Write final/, and adapter/ where there is one; the plain model on the main process, None on the others."""
    trainer, backend = ran
    state = training_trainer.whole_state(trainer, backend)
    net = training_trainer.unwrapped(trainer)
    if not backend.main:
        trainer.accelerator.wait_for_everyone()
        return None
    if config.adapter == "none":
        _stop_at_end_of_turn(net, base.tokenizer)
        net.config.use_cache = True
        loading.save_model(net, base.tokenizer, place.final, state)
        whole = net if state is None else base.reopened(place.final, config.training.precision)
    else:
        with whole_folder(place.path / "adapter") as aside:
            net.save_pretrained(aside, state_dict=state)
            save_tokenizer(base.tokenizer, aside)
        whole = lora.merged(base, place.path / "adapter", config.training.precision)
        _stop_at_end_of_turn(whole, base.tokenizer)
        loading.save_model(whole, base.tokenizer, place.final)
    trainer.accelerator.wait_for_everyone()
    return whole


def _measured(config: Sft, net: PreTrainedModel, checked: Checked, device: torch.device) -> dict[str, float]:
    """What the held-out rows say of a model, on one device: the loss of conversations, or how it takes the pairs. Nothing where it does not fit."""
    held, size = checked.examples.held_out, config.training.per_device_eval_batch_size
    if not held:
        return {}
    mixed = config.training.precision == "bf16_mixed"  # as it trains
    try:
        net.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            if config.method == "sft":
                return {"loss": round(likelihood.loss(net, held, size) or 0.0, 5)}
            found = likelihood.preferences(net, held, size)
    except torch.OutOfMemoryError:
        say("  warning: the held-out rows are not measured: the whole model has no room on one GPU")
        net.to("cpu")
        release()
        return {}
    return {"accuracy": round(sum(value > 0 for value in found) / len(found), 5), "margin": round(math.fsum(found) / len(found), 5)}


DEFINITIONS = {
    "held_out_loss": "mean -ln p a trained token of the held-out conversations; comparable within one tokenizer only",
    "held_out_accuracy": "share of the held-out pairs whose chosen answer the model finds likelier than the rejected one, by the sum of ln p over its tokens",
    "held_out_margin": "mean over the held-out pairs of ln p(chosen) - ln p(rejected)",
}


QUANTIZED = "; before: of the base in 4 bits, after: of the base as it is with the adapter added"


def _result(config: Sft, parameters: int, checked: Checked, happened: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    names = ("loss",) if config.method == "sft" else ("accuracy", "margin")
    found = {f"held_out_{name}": {side: measured[side].get(name) for side in ("before", "after")} for name in names}
    return {
        "stage": "sft",
        "method": config.method,
        "adapter": config.adapter,
        "parameters": parameters,
        "new_tokens": checked.base.tokenizer.convert_ids_to_tokens(checked.new_tokens),
        "data": dict(checked.examples.counts),
        "training": happened,
        **found,
        "definitions": {name: DEFINITIONS[name] + (QUANTIZED if config.adapter == "qlora" else "") for name in found},
    }


def _stop_at_end_of_turn(net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the tokenizer's EOS (the end of a turn) and at whatever ended it before."""
    previous = net.generation_config.eos_token_id
    ends = previous if isinstance(previous, list) else [] if previous is None else [previous]
    net.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
    net.generation_config.pad_token_id = tokenizer.pad_token_id
    net.config.eos_token_id = net.generation_config.eos_token_id
    net.config.pad_token_id = tokenizer.pad_token_id
