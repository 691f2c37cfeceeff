"""Stage pretrain: adapt a vocabulary, train in phases, measure bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from azrecipe.data import preparation
from azrecipe.data.inputs import Inputs
from azrecipe.data.mixture import Mixture
from azrecipe.data.phase_schedule import PhaseSchedule
from azrecipe.data.pretrain_inputs import PretrainInputs
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import read_first_text
from azrecipe.distributed import local_storage, requirements
from azrecipe.distributed.attention_choice import AttentionUse, check_attention, check_model_attention
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CommandError
from azrecipe.modeling import (
    attention,
    chunked_loss,
    compilation,
    frozen_weights,
    liger_kernels,
    loading,
    new_tokens,
    parameter_groups,
    word_vectors,
)
from azrecipe.modeling.planned_model import build_planned_model
from azrecipe.modeling.vocabulary_swap import EmbeddingInit, SwapReport, check_swap, find_shared_tokens, pad_vocabulary, swap_vocabulary
from azrecipe.planning import run_estimate
from azrecipe.planning.model_config import ModelShape
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.stage_outputs import StageOutput
from azrecipe.recipe.types import PretrainConfig
from azrecipe.runs.run_attention import settle_attention
from azrecipe.runs.run_dir import RunDir, check_run_matches, connect_processes, locate_run, open_run
from azrecipe.tokenization.tokenizer import count_embedding_rows, have_same_vocabulary, load_tokenizer
from azrecipe.training import checkpoints, learning_rates, main_process_loading, profiling, trainer
from azrecipe.training.pretraining import PhaseRecord, PretrainJob, release_memory, remove_finished_checkpoints, train_phase
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _AdaptedModel:
    """A recipe's model before its weights are read.

    Attributes:
        base_tokenizer: The tokenizer that the model was made with.
        new_token_ids: Tokens that the model lacks.
        trainable: What each phase trains.
        shape: The model as it will train, for estimates.
        attention: What the run needs of its attention.
    """

    base_tokenizer: PreTrainedTokenizerBase
    new_token_ids: list[int]
    trainable: list[parameter_groups.TrainableParameters]
    shape: ModelShape
    attention: AttentionUse


@dataclass(frozen=True)
class PretrainCheck:
    """What `azrecipe check` shows of a pretrain recipe."""

    tokenizer: PreTrainedTokenizerBase
    trainable: list[parameter_groups.TrainableParameters]
    first_texts: list[str]


@dataclass(frozen=True)
class PretrainPreparation:
    """What `azrecipe prepare` put into the cache, and its mixture."""

    text: preparation.PreparedText
    inputs: PretrainInputs
    mixture: Mixture

    def build_schedule(self) -> PhaseSchedule:
        """Lay the phases over the mixture. Raises RecipeError as a run would."""
        return self.inputs.build_schedule(self.mixture)


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Load, check, adapt the vocabulary, train phase after phase, measure, save."""
    run_dir = locate_run(recipe, runs_dir, backend.main)

    # Load and check: everything that can be refused is refused here.
    _check_backend(recipe, backend, run_dir)
    inputs = PretrainInputs.load(recipe, runs_dir)
    check_run_matches(recipe, run_dir, inputs.fingerprints)
    adapted = _check_model(inputs, backend.context_parallel_size)
    recipe = settle_attention(recipe, adapted.attention, run_dir)
    config: PretrainConfig = recipe.config
    simulation = run_estimate.begin_simulation(recipe, adapted.shape, backend)
    schedule = inputs.build_schedule(inputs.build_mixture())
    profiling.check_profile_steps(recipe, {phase.name: phase.steps for phase in schedule.phases}, backend.main)

    with open_run(recipe, run_dir, inputs.fingerprints), run_estimate.explain_out_of_memory(run_dir):
        record = PhaseRecord(run_dir)  # read by every process before any trains, so that all agree
        job = PretrainJob(config, run_dir, backend, inputs.tokenizer, inputs.held_out, schedule, record, adapted.new_token_ids)
        _print_plan(job, inputs.sources)
        run_estimate.estimate_run(recipe, adapted.shape, run_dir, backend, simulation)
        record.forget_incomplete([(phase.name, job.model_folder(i)) for i, phase in enumerate(schedule.phases)])
        unfinished = [i for i, phase in enumerate(schedule.phases) if not record.is_finished(phase.name)]
        is_first_phase = len(unfinished) == len(schedule.phases)
        embedding_init = _load_embedding_init(job, adapted.base_tokenizer) if is_first_phase else None
        # The process group starts here: above, no process waited for another one inside it.
        connect_processes(run_dir, {**inputs.fingerprints, "the text, tokenised": schedule.end.fingerprint})
        remove_finished_checkpoints(job)  # a kill may have come between the end of a phase and this
        model = None
        if embedding_init is not None:
            model = _prepare_model(job, inputs.model_path, adapted.base_tokenizer, embedding_init)
        for i in unfinished:
            if model is None:
                model = _load_phase_model(job, i - 1)
            train_phase(job, model, i)
            model = None
            release_memory()
        run_dir.mark_complete(_build_result(job, inputs.sources))
    return read_json(run_dir.path / "result.json") or {}


def check(recipe: Recipe, runs_dir: Path) -> PretrainCheck:
    """Refuse what a run would refuse; needs no weights and no GPU."""
    extras.check_optimizers(optimizer_settings.list_optimizers(recipe.config))
    inputs = PretrainInputs.load(recipe, runs_dir)
    adapted = _check_model(inputs, context_parallel_size=1)
    return PretrainCheck(inputs.tokenizer, adapted.trainable, [read_first_text(source) for source in inputs.sources])


def check_planned(recipe: Recipe, inputs: Inputs, output: StageOutput | None) -> None:
    """Refuse what shows before the model exists: text, length, parameters."""
    config: PretrainConfig = recipe.config
    extras.check_optimizers(optimizer_settings.list_optimizers(config))
    sources = inputs.locate_datasets(list(config.data.datasets))
    inputs.read_validation(config.data.validation)
    for source in sources:
        read_first_text(source)
    try:
        planned = build_planned_model(output) if output is not None else None
    except CommandError as error:
        raise recipe.error(str(error), "model") from None
    if planned is not None:
        _check_architecture(recipe, planned.model)
        _find_trainable_parameters(recipe, planned.model, new_token_ids=[0])  # which tokens will be new is not known yet


def prepare(recipe: Recipe, runs_dir: Path) -> PretrainPreparation:
    """Fill the cache with what a run of this recipe reads."""
    inputs = PretrainInputs.load(recipe, runs_dir)
    mixture = inputs.build_mixture()
    text = preparation.PreparedText(inputs.sources, mixture.stores, inputs.config.data.max_length)
    return PretrainPreparation(text, inputs, mixture)


def _check_backend(recipe: Recipe, backend: Backend, run_dir: RunDir) -> None:
    """Refuse what the launched processes cannot do with this recipe."""
    config: PretrainConfig = recipe.config
    trainer.check_training(config.training, backend)
    check_attention(config.model.attn_implementation, AttentionUse("pretrain", config.training.precision))
    requirements.check_context_parallel(backend.context_parallel_size, recipe)
    checkpoints.check_readable(run_dir.checkpoints_dir, backend)
    if backend.uses_deepspeed and config.training.on_bad_loss == "skip":
        message = "DeepSpeed changes the weights within its backward pass, so a bad step can stop the run and cannot be skipped: on_bad_loss: stop"
        raise recipe.error(message, "training", "on_bad_loss")
    extras.check_optimizers(optimizer_settings.list_optimizers(config))
    requirements.check_fsdp_limits(config, backend.uses_fsdp, backend.data_parallel_size)


def _check_model(inputs: PretrainInputs, context_parallel_size: int) -> _AdaptedModel:
    """Refuse a model, vocabulary or phases that cannot be trained.

    The model is built on the meta device: no weights are read.
    """
    recipe, config = inputs.recipe, inputs.config
    model, base_tokenizer = _build_meta_model(inputs)
    _check_architecture(recipe, model)
    if context_parallel_size > 1 and (obstacle := loading.find_context_parallel_obstacle(model)):
        raise recipe.error(f"the accelerate config splits sequences over processes, and this model {obstacle}", "model")
    use = AttentionUse(
        "pretrain",
        config.training.precision,
        config.data.packing,
        context_parallel_size,
        attention.find_model_obstacles(model),
        str(model.config._attn_implementation),
    )
    check_model_attention(recipe, use)
    new_token_ids = new_tokens.find_new_tokens(inputs.model_path, base_tokenizer, inputs.tokenizer)
    trainable = _find_trainable_parameters(recipe, model, new_token_ids)
    rows = _count_embedding_rows(config, model, base_tokenizer, inputs.tokenizer)
    shape = run_estimate.build_model_shape(model.config, rows, len(new_token_ids))
    return _AdaptedModel(base_tokenizer, new_token_ids, trainable, shape, use)


def _check_architecture(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse kernels and a length that a model cannot have."""
    config: PretrainConfig = recipe.config
    if config.training.use_liger_kernel:
        liger_kernels.check_liger_kernels(recipe, model.config.model_type)
    if config.training.torch_compile:
        compilation.check_torch_compile(recipe, model)
    if config.training.fused_linear_cross_entropy == "torch":
        try:
            chunked_loss.check_chunked_loss(model)
        except CommandError as error:
            raise recipe.error(f"PyTorch's chunked loss: {error}", "training", "fused_linear_cross_entropy") from None
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        message = f"data.max_length = {config.data.max_length:,} is more than the model's {limit:,} positions"
        raise recipe.error(message, "data", "max_length")


def _find_trainable_parameters(
    recipe: Recipe, model: PreTrainedModel, new_token_ids: list[int]
) -> list[parameter_groups.TrainableParameters]:
    trainable = []
    for i, phase in enumerate(recipe.config.phases):
        try:
            trainable.append(parameter_groups.set_trainable_parameters(model, phase.trainable_parameters, new_token_ids))
        except CommandError as error:
            raise recipe.error(str(error), "phases", i, "trainable_parameters") from None
        try:
            learning_rates.resolve_learning_rates(model, phase.learning_rates)
        except CommandError as error:
            raise recipe.error(str(error), "phases", i, "learning_rates") from None
    return trainable


def _build_meta_model(inputs: PretrainInputs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build the base model without weights; also returns its own tokenizer."""
    config, settings = inputs.config, inputs.config.model
    if inputs.model_path is None:
        assert settings.config is not None
        try:
            with torch.device("meta"):
                model = loading.build_model(settings.config, inputs.tokenizer, config.training.precision, AUTO, config.seed)
        except CommandError as error:
            raise inputs.recipe.error(str(error), "model", "config") from None
        return model, inputs.tokenizer
    model = loading.load_meta_model(inputs.model_path, settings.revision)
    base_tokenizer = load_tokenizer(inputs.model_path, settings.revision)
    loading.check_vocabulary_size(model, base_tokenizer, inputs.model_path)
    if not have_same_vocabulary(base_tokenizer, inputs.tokenizer):
        check_swap(base_tokenizer, inputs.tokenizer, config.tokenizer.new_embeddings)
        extras.check_word_vectors(config.tokenizer.new_embeddings)
    return model, base_tokenizer


def _count_embedding_rows(
    config: PretrainConfig, model: PreTrainedModel, base_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Count the rows that the embeddings will have."""
    is_kept = have_same_vocabulary(base_tokenizer, tokenizer)
    rows = model.get_input_embeddings().weight.shape[0] if is_kept else count_embedding_rows(tokenizer)
    multiple = config.tokenizer.pad_to_multiple_of or 1
    return -(-int(rows) // multiple) * multiple


def _print_plan(job: PretrainJob, sources: Sequence[DataSource]) -> None:
    schedule = job.schedule
    for source, store, share, epochs in zip(sources, schedule.mix.stores, schedule.shares, schedule.source_epochs, strict=True):
        size = f"{store.num_documents:,} documents, {store.num_bytes:,} bytes, {store.num_tokens:,} tokens"
        dropped = preparation.format_dropped(store)
        print_progress(f"  {source.title}: {size}; {share:.0%} of the text, {epochs:.2f} epochs{dropped}", job.backend.main)
    for phase, shares in schedule.phase_shares.items():
        named = ", ".join(f"{source.title} {share:.1%}" for source, share in zip(sources, shares, strict=True))
        print_progress(f"  phase {phase} reads {named}", job.backend.main)


def _load_embedding_init(job: PretrainJob, base_tokenizer: PreTrainedTokenizerBase) -> EmbeddingInit:
    """Compute or load how new embeddings start; processes may wait here."""
    method, combinations = job.config.tokenizer.new_embeddings, None
    if method in extras.WORD_VECTOR_METHODS and not have_same_vocabulary(base_tokenizer, job.tokenizer):
        shared = find_shared_tokens(base_tokenizer, job.tokenizer)
        combinations = word_vectors.compose_embeddings(job.schedule.mix, job.run_dir.cache_dir, method, shared)
    return EmbeddingInit(method, job.config.seed, combinations)


def _load_phase_model(job: PretrainJob, phase_index: int) -> PreTrainedModel:
    """Load the model that a phase left."""
    precision, attention_name = job.config.training.precision, job.config.model.attn_implementation
    attention.prepare_attention(attention_name)  # on every process: one may only build the model
    with local_storage.replicate_folder(job.model_folder(phase_index), job.run_dir.cache_dir, job.backend.main) as folder:
        return main_process_loading.load_on_main(lambda: loading.load_model(str(folder), precision, attention_name), job.backend)


def _prepare_model(
    job: PretrainJob, model_path: str | None, base_tokenizer: PreTrainedTokenizerBase, embedding_init: EmbeddingInit
) -> PreTrainedModel:
    """Load the model, swap its vocabulary, and measure before and after."""
    config, settings = job.config, job.config.model
    attention.prepare_attention(settings.attn_implementation)  # on every process: one may only build the model

    def load() -> PreTrainedModel:
        if model_path is None:
            assert settings.config is not None
            return loading.build_model(settings.config, job.tokenizer, config.training.precision, settings.attn_implementation, config.seed)
        return loading.load_model(model_path, config.training.precision, settings.attn_implementation, settings.revision)

    def change_vocabulary(model: PreTrainedModel) -> SwapReport | None:
        swap = None if is_kept else swap_vocabulary(model, base_tokenizer, job.tokenizer, embedding_init)
        return _pad_vocabulary(job, model, swap)

    is_kept = model_path is None or have_same_vocabulary(base_tokenizer, job.tokenizer)
    model = main_process_loading.load_on_main(load, job.backend)
    if model_path is not None:
        _record_bpb(job, "base", model, base_tokenizer)
    model, swap = main_process_loading.change_on_main(change_vocabulary, model, job.backend)
    if swap is not None and model_path is not None:
        print_progress(f"  vocabulary {swap}", job.backend.main)
    if not is_kept:
        _record_bpb(job, "new_vocabulary", model, job.tokenizer)
    _record_vocabulary(job, model, swap)
    return model


def _record_bpb(job: PretrainJob, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure a model that does not train yet.

    With bf16_mixed its matrices are on the device in bfloat16, which is what autocast multiplies in; then they are exact again, in main memory.
    Under FSDP a sharded copy is measured instead, which holds float32 shards.
    """
    if main_process_loading.has_main_process_loading(job.backend, model):
        job.record_bpb(name, main_process_loading.shard_copy(model, job.backend), tokenizer)
        release_memory()
        return
    mixed = job.config.training.precision == "bf16_mixed"
    exact_weights = frozen_weights.round_matrices(model, keep_exact=True, frozen_only=False) if mixed else {}
    job.record_bpb(name, model.to(PartialState().device), tokenizer)
    frozen_weights.restore_matrices(model, exact_weights)


def _record_vocabulary(job: PretrainJob, model: PreTrainedModel, swap: SwapReport | None) -> None:
    job.record.update(vocabulary=asdict(swap) if swap else None, parameters=loading.count_parameters(model))


def _pad_vocabulary(job: PretrainJob, model: PreTrainedModel, swap: SwapReport | None) -> SwapReport | None:
    """Pad the model's vocabulary as the recipe asks; None: no change."""
    settings, num_tokens = job.config.tokenizer, len(job.tokenizer)
    if settings.pad_to_multiple_of is None:
        return swap
    padding = pad_vocabulary(model, count_embedding_rows(job.tokenizer), settings.pad_to_multiple_of)
    return replace(swap or SwapReport(num_tokens, num_tokens, num_tokens, 0, 0, 0, settings.new_embeddings), padding=padding)


def _build_result(job: PretrainJob, sources: Sequence[DataSource]) -> dict[str, Any]:
    schedule, record = job.schedule, job.record
    data = [
        {**preparation.summarize_source(source, store), "share": round(share, 4), "epochs": round(epochs, 3)}
        for source, store, share, epochs in zip(sources, schedule.mix.stores, schedule.shares, schedule.source_epochs, strict=True)
    ]
    if schedule.phase_shares:
        for i, entry in enumerate(data):
            entry["phase_shares"] = {phase: round(shares[i], 4) for phase, shares in schedule.phase_shares.items()}
    window = f"windows of at most {job.config.data.max_length} tokens that overlap by half"
    return {
        "stage": "pretrain",
        "attn_implementation": job.config.model.attn_implementation,
        "parameters": record.data.get("parameters"),
        "vocabulary": record.data.get("vocabulary"),
        "vocab_size": len(job.tokenizer),
        "bpb": record.data["bpb"],
        "phases": record.data["phases"],
        "data": data,
        "data_end": asdict(schedule.end),
        "bytes": schedule.num_bytes,
        "definitions": {
            "bpb": f"sum of -log2 p over all tokens of the held-out text / its UTF-8 bytes; BOS is context, EOS is not asked for, {window}"
        },
    }
