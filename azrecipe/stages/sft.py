"""Stage sft: tune a model on conversations or preferences.

It ends with one plain model in final/, and the adapter in adapter/.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from azrecipe.data import finetuning_examples
from azrecipe.data.finetuning_examples import FinetuningExamples, FinetuningPlan
from azrecipe.data.inputs import Inputs
from azrecipe.distributed import requirements
from azrecipe.distributed.attention_choice import AttentionUse, check_attention, check_model_attention
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CommandError
from azrecipe.evaluation import likelihood
from azrecipe.modeling import attention, compilation, liger_kernels, loading, lora
from azrecipe.modeling.planned_model import build_planned_model
from azrecipe.modeling.vocabulary_swap import add_embedding_rows
from azrecipe.planning import run_estimate
from azrecipe.planning.model_config import ModelShape
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.stage_outputs import StageOutput
from azrecipe.recipe.types import SftConfig
from azrecipe.runs.run_attention import settle_attention
from azrecipe.runs.run_dir import RunDir, check_run_matches, connect_processes, locate_run, open_run
from azrecipe.tokenization import chat_templates
from azrecipe.tokenization.tokenizer import count_embedding_rows, load_tokenizer, save_tokenizer
from azrecipe.training import checkpoints, finetuning, learning_rates, profiling
from azrecipe.training import trainer as training_trainer
from azrecipe.training.pretraining import release_memory
from azrecipe.utils.atomic_files import atomic_folder, read_json
from azrecipe.utils.console import print_progress
from azrecipe.utils.paths import is_template_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SftInputs:
    """What a run works on, checked as far as possible without weights."""

    base: lora.BaseModel
    examples: FinetuningExamples
    plan: FinetuningPlan
    new_token_ids: list[int]
    shape: ModelShape
    attention: AttentionUse


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Load, check every row, tune, merge, measure, save."""
    config: SftConfig = recipe.config
    run_dir = locate_run(recipe, runs_dir, backend.main)
    inputs = Inputs(recipe, runs_dir)

    training_trainer.check_training(config.training, backend)
    check_attention(config.model.attn_implementation, AttentionUse("sft", config.training.precision))
    requirements.check_context_parallel(backend.context_parallel_size, recipe)
    checkpoints.check_readable(run_dir.checkpoints_dir, backend)
    requirements.check_adapter_backend(config.adapter, backend)
    extras.check_optimizers(optimizer_settings.list_optimizers(config))
    requirements.check_fsdp_limits(config, backend.uses_fsdp, backend.data_parallel_size)
    checked = check(recipe, inputs)
    requirements.check_new_token_rows(backend, checked.new_token_ids if config.adapter != "none" else [], config.lora)
    check_run_matches(recipe, run_dir, inputs.fingerprints)
    recipe = settle_attention(recipe, checked.attention, run_dir)
    config = recipe.config
    profiling.check_profile_steps(recipe, {config.method: checked.plan.steps}, backend.main)

    with open_run(recipe, run_dir, inputs.fingerprints), run_estimate.explain_out_of_memory(run_dir):
        _print_plan(config, checked, backend)
        run_estimate.estimate_run(recipe, checked.shape, run_dir, backend)
        device = connect_processes(run_dir, inputs.fingerprints)
        base = replace(checked.base, settings=config.model)
        model = base.load_quantized(config.training.precision) if config.adapter == "qlora" else base.load(config.training.precision)
        run_dir.require_disk_space(3 * 4 * loading.count_parameters(model), "the tuned model")
        before = _measure_held_out(config, model, checked, device) if backend.main else {}
        tuned_model = _build_tuned_model(config, base, model, checked.new_token_ids, backend)
        trainer, training_summary = finetuning.tune_model(
            config, tuned_model, checked.examples, checked.plan, run_dir=run_dir, backend=backend
        )
        final_model = _save_model(config, run_dir, base, trainer=trainer, backend=backend)
        del trainer, tuned_model, model
        release_memory()  # before a second model goes to the device
        if final_model is not None:
            after = _measure_held_out(config, final_model, checked, device)
            run_dir.mark_complete(
                _build_result(config, loading.count_parameters(final_model), checked, training_summary, {"before": before, "after": after})
            )
        PartialState().wait_for_everyone()
    return read_json(run_dir.path / "result.json") or {}


def check(recipe: Recipe, inputs: Inputs) -> SftInputs:
    """Read every row and refuse what cannot be trained; needs no weights."""
    config: SftConfig = recipe.config
    path = inputs.find_model(config.model, "model")
    model = loading.load_meta_model(path, config.model.revision)
    tokenizer = load_tokenizer(path, config.model.revision)
    loading.check_vocabulary_size(model, tokenizer, path)
    rows = _read_rows(recipe, inputs)
    use = AttentionUse(
        "sft",
        config.training.precision,
        config.data.packing,
        obstacles=attention.find_model_obstacles(model),
        default=str(model.config._attn_implementation),
    )
    check_model_attention(recipe, use)
    new_token_ids = _check_model(recipe, model, tokenizer, rows)
    num_rows = max(int(model.get_input_embeddings().weight.shape[0]), count_embedding_rows(tokenizer))
    shape = run_estimate.build_model_shape(model.config, num_rows, len(new_token_ids))
    _check_trainable_parts(recipe, model, new_token_ids if config.lora.train_new_tokens else [], tokenizer)
    examples = finetuning_examples.build_examples(config, tokenizer, rows)
    return SftInputs(
        lora.BaseModel(path, config.model, tokenizer),
        examples,
        finetuning_examples.plan_sequences(config, examples.train),
        new_token_ids,
        shape,
        use,
    )


def check_planned(recipe: Recipe, inputs: Inputs, output: StageOutput | None) -> None:
    """Refuse what shows before the model exists: rows, template, adapter."""
    rows = _read_rows(recipe, inputs)
    try:
        planned = build_planned_model(output) if output is not None else None
    except CommandError as error:
        raise recipe.error(str(error), "model") from None
    if planned is not None:
        new_token_ids = _check_model(recipe, planned.model, planned.tokenizer, rows)
        _check_trainable_parts(recipe, planned.model, new_token_ids if recipe.config.lora.train_new_tokens else [], planned.tokenizer)


def _read_rows(recipe: Recipe, inputs: Inputs) -> list[list[Any]]:
    config: SftConfig = recipe.config
    if is_template_file(config.chat_template):
        inputs.fingerprints["chat_template"] = hashlib.sha256(Path(config.chat_template).read_bytes()).hexdigest()
    sources = [inputs.locate_source(source, "data", "datasets", i) for i, source in enumerate(config.data.datasets)]
    return finetuning_examples.read_sources(config, sources)


def _check_model(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[Any]]) -> list[int]:
    """Set the chat template; refuse a model that does not fit the recipe.

    Returns the ids of the tokens that the template adds.
    """
    config: SftConfig = recipe.config
    if config.training.use_liger_kernel:
        liger_kernels.check_liger_kernels(recipe, model.config.model_type)
    if config.training.torch_compile:
        compilation.check_torch_compile(recipe, model)
    try:
        new_token_ids = chat_templates.set_chat_template(
            tokenizer,
            config.chat_template,
            config.training.assistant_only_loss and config.method == "sft",  # DPO always scores the answers
            finetuning_examples.to_messages(rows[0][0]),
        )
    except CommandError as error:
        raise recipe.error(str(error), "chat_template") from None
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        message = f"data.max_length = {config.data.max_length:,} is more than the model's {limit:,} positions"
        raise recipe.error(message, "data", "max_length")
    return new_token_ids


def _check_trainable_parts(
    recipe: Recipe, model: PreTrainedModel, new_token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse an adapter or learning rates that this model cannot have."""
    config: SftConfig = recipe.config
    adapted: Any = model
    if config.adapter != "none":
        from peft import get_peft_model

        try:
            with torch.device("meta"):
                add_embedding_rows(model, count_embedding_rows(tokenizer))
            adapter = lora.build_lora_config(config.lora, model, new_token_ids)
        except CommandError as error:
            raise recipe.error(str(error), "lora") from None
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    try:
        learning_rates.resolve_learning_rates(adapted, config.training.learning_rates)
    except CommandError as error:
        raise recipe.error(str(error), "training", "learning_rates") from None


def _print_plan(config: SftConfig, checked: SftInputs, backend: Backend) -> None:
    counts, plan = checked.examples.counts, checked.plan
    kind = "pairs" if config.method == "dpo" else "conversations"
    dropped = f"longer than {config.data.max_length} tokens" if config.method == "dpo" else "without a trained token"
    packed = f", in {len(plan.sequences):,} sequences" if config.data.packing else ""
    print_progress(f"  {counts['train']:,} {kind} to train on{packed}, {counts['held_out']:,} held out, {counts['duplicates']:,} duplicates and {counts['dropped']:,} "
        f"{dropped} left out, {counts['truncated']:,} cut to {config.data.max_length} tokens", backend.main)  # fmt: skip
    if checked.new_token_ids:
        names = ", ".join(checked.base.tokenizer.convert_ids_to_tokens(checked.new_token_ids))
        print_progress(f"  new tokens: {names}", backend.main)


def _build_tuned_model(
    config: SftConfig, base: lora.BaseModel, model: PreTrainedModel, new_token_ids: Sequence[int], backend: Backend
) -> finetuning.TunedModel:
    """Choose what trains; rows of untrained tokens train beside an adapter."""
    if config.adapter == "none":
        reference = base.load(config.training.precision) if config.method == "dpo" else None
        return finetuning.TunedModel(model, base.tokenizer, None, reference)
    shipped = chat_templates.SHIPPED_TEMPLATES.get(config.chat_template)
    ids = [i for i in base.tokenizer.convert_tokens_to_ids(list(shipped.special_tokens)) if i not in new_token_ids] if shipped else []
    rows = [*new_token_ids, *(lora.find_untrained_tokens(model, ids) if ids else [])]
    if rows and (backend.sharded or not config.lora.train_new_tokens):
        names = ", ".join(base.tokenizer.convert_ids_to_tokens(rows))
        why = "they cannot train with a sharded backend" if backend.sharded else "lora.train_new_tokens is false"
        print_progress(
            f"  warning: the rows of {names} are untrained, and {why}: these tokens mean nothing to the model",
            backend.main,
        )
        rows = []
    return finetuning.TunedModel(model, base.tokenizer, lora.build_lora_config(config.lora, model, rows))


def _save_model(config: SftConfig, run_dir: RunDir, base: lora.BaseModel, *, trainer: Any, backend: Backend) -> PreTrainedModel | None:
    """Write final/ and, where there is one, adapter/.

    Returns:
        The plain model on the main process, None on the others.
    """
    state = training_trainer.gather_state_dict(trainer, backend)
    model = training_trainer.unwrap_model(trainer)
    if not backend.main:
        trainer.accelerator.wait_for_everyone()
        return None
    if config.adapter == "none":
        _stop_at_end_of_turn(model, base.tokenizer)
        model.config.use_cache = True
        loading.save_model(model, base.tokenizer, run_dir.final_dir, state)
        final_model = model if state is None else base.load_saved(run_dir.final_dir, config.training.precision)
    else:
        with atomic_folder(run_dir.path / "adapter") as tmp:
            model.save_pretrained(tmp, state_dict=state)
            save_tokenizer(base.tokenizer, tmp)
        final_model = lora.merge_adapter(base, run_dir.path / "adapter", config.training.precision)
        _stop_at_end_of_turn(final_model, base.tokenizer)
        loading.save_model(final_model, base.tokenizer, run_dir.final_dir)
    trainer.accelerator.wait_for_everyone()
    return final_model


def _measure_held_out(config: SftConfig, model: PreTrainedModel, checked: SftInputs, device: torch.device) -> dict[str, float]:
    """Measure a model on held-out rows; empty where it does not fit.

    Conversations give the loss, pairs the accuracy and the margin.
    """
    held_out, size = checked.examples.held_out, config.training.per_device_eval_batch_size
    if not held_out:
        return {}
    mixed = config.training.precision == "bf16_mixed"  # as it trains
    try:
        model.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            if config.method == "sft":
                return {"loss": round(likelihood.compute_mean_loss(model, held_out, size) or 0.0, 5)}
            margins = likelihood.compute_preferences(model, held_out, size)
    except torch.OutOfMemoryError:
        print_progress("  warning: the held-out rows are not measured: the model does not fit on one GPU")
        model.to("cpu")
        release_memory()
        return {}
    return {"accuracy": round(sum(value > 0 for value in margins) / len(margins), 5), "margin": round(math.fsum(margins) / len(margins), 5)}


DEFINITIONS = {
    "held_out_loss": "mean -ln p a trained token of the held-out conversations; comparable within one tokenizer only",
    "held_out_accuracy": "share of the held-out pairs whose chosen answer the model finds likelier than the rejected one, by the sum of ln p over its tokens",
    "held_out_margin": "mean over the held-out pairs of ln p(chosen) - ln p(rejected)",
}


QUANTIZED_DEFINITION = "; before: of the base in 4 bits, after: of the base as it is with the adapter added"


def _build_result(
    config: SftConfig, parameters: int, checked: SftInputs, training_summary: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    names = ("loss",) if config.method == "sft" else ("accuracy", "margin")
    held_out_metrics = {f"held_out_{name}": {side: measured[side].get(name) for side in ("before", "after")} for name in names}
    return {
        "stage": "sft",
        "method": config.method,
        "adapter": config.adapter,
        "attn_implementation": config.model.attn_implementation,
        "parameters": parameters,
        "new_tokens": checked.base.tokenizer.convert_ids_to_tokens(checked.new_token_ids),
        "data": dict(checked.examples.counts),
        "training": training_summary,
        **held_out_metrics,
        "definitions": {name: DEFINITIONS[name] + (QUANTIZED_DEFINITION if config.adapter == "qlora" else "") for name in held_out_metrics},
    }


def _stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end at the end of a turn too."""
    previous = model.generation_config.eos_token_id
    ends = previous if isinstance(previous, list) else [] if previous is None else [previous]
    model.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *ends]))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
