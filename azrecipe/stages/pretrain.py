"""Stage pretrain: a base model (or a new one), its vocabulary, phases of training on text, bits per byte before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from azrecipe.data import preparation, readers
from azrecipe.data import sources as data_sources
from azrecipe.data.inputs import Inputs
from azrecipe.data.mixture import Mix, temperature_weights
from azrecipe.data.packing import borders, layout, packing
from azrecipe.data.phase_schedule import Position, Schedule, TextEnds, plan
from azrecipe.distributed import local_storage, requirements
from azrecipe.distributed.backend import Backend
from azrecipe.distributed.requirements import check_context
from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.modeling import chunked_loss, liger_kernels, loading, new_tokens, parameter_groups, word_vectors
from azrecipe.modeling.vocabulary_swap import Start, Swap, check_swap, pad_vocabulary, shared_tokens, swap_vocabulary
from azrecipe.planning import run_estimate
from azrecipe.planning.model_config import ModelShape
from azrecipe.recipe import extras, optimizer_settings
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Pretrain
from azrecipe.runs import run_dir
from azrecipe.runs.run_dir import connect
from azrecipe.tokenization import bpe_training
from azrecipe.tokenization.tokenizer import load_tokenizer, rows_needed, same_vocabulary, save_tokenizer
from azrecipe.training import checkpoints, profiling, trainer
from azrecipe.training.pretraining import Job, Record, clear, release, train_phase
from azrecipe.utils.atomic_files import locked, read_json, whole_folder
from azrecipe.utils.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Texts = Mapping[str, list[str]]


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Load, check, adapt the vocabulary, train phase after phase, measure, save."""
    config: Pretrain = recipe.config
    place = run_dir.locate(recipe, runs_dir, backend.main)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    trainer.check(config.training, backend)
    check_context(backend.context, recipe)
    checkpoints.check_readable(place.checkpoints, backend)
    if backend.zero and config.training.on_bad_loss == "skip":
        message = "DeepSpeed changes the weights within its backward pass, so a bad step can stop the run and cannot be skipped: on_bad_loss: stop"
        raise recipe.problem(message, "training", "on_bad_loss")
    extras.check_optimizers(optimizer_settings.named(config))
    requirements.check_sharded(config, backend.fsdp, backend.readers)
    model_path = None if config.model.config is not None else inputs.folder(config.model, "model")
    before = _continued(recipe, inputs)
    sources = inputs.datasets(list(config.data.datasets))
    held_out = inputs.validation(config.data.validation)
    tokenizer = _tokenizer(config, inputs, sources, place.cache, model_path)
    run_dir.check_same(recipe, place, inputs.found)
    own, new, _, shape = _check_model(recipe, model_path, tokenizer, backend.context)
    mix = _mix(config, preparation.Text(sources, held_out, frozenset(inputs.came)), tokenizer, place.cache)
    schedule = _schedule(recipe, mix, tokenizer, (before, place.cache))
    profiling.check(recipe, {phase.name: phase.steps for phase in schedule.phases}, backend.main)

    with run_dir.opened(recipe, place, inputs.found), run_estimate.explained(place):
        record = Record(place)  # read by every process before any trains, so that all agree
        job = Job(config, place, backend, tokenizer, held_out, schedule, record, new)
        _describe(job, sources)
        run_estimate.foresee(recipe, shape, place, backend)
        record.forget_torn([(phase.name, job.folder(i)) for i, phase in enumerate(schedule.phases)])
        todo = [i for i, phase in enumerate(schedule.phases) if not record.done(phase.name)]
        start = _start(job, own) if len(todo) == len(schedule.phases) else None
        # The process group starts here: nothing above made one process wait for another inside it
        connect(place, {**inputs.found, "the text, tokenised": schedule.end.fingerprint})
        clear(job)  # a kill may have come between the end of a phase and this
        net = _begin(job, model_path, own, start) if start is not None else None
        for i in todo:
            if net is None:
                with local_storage.everywhere(job.folder(i - 1), place.cache, backend.main) as there:
                    net = loading.load_model(str(there), config.training.precision, config.model.attn_implementation)
            train_phase(job, net, i)
            net = None
            release()
        place.finish(_result(job, sources))
    return read_json(place.path / "result.json") or {}


def check(recipe: Recipe, runs_dir: Path) -> tuple[PreTrainedTokenizerBase, list[parameter_groups.Trained], list[str]]:
    """Refuse what a run would refuse before it reads its text; needs no weights and no GPU.

    Returns the tokenizer, what each phase trains, and how the text of each source begins.
    """
    config: Pretrain = recipe.config
    inputs = Inputs(recipe, runs_dir)
    extras.check_optimizers(optimizer_settings.named(config))
    model_path = None if config.model.config is not None else inputs.folder(config.model, "model")
    _continued(recipe, inputs)
    sources = inputs.datasets(list(config.data.datasets))
    inputs.validation(config.data.validation)
    tokenizer = _tokenizer(config, inputs, sources, run_dir.locate(recipe, runs_dir).cache, model_path)
    _, _, trained, _ = _check_model(recipe, model_path, tokenizer, 1)
    begins = [next(data_sources.texts(source), None) for source in sources]
    for source, text in zip(sources, begins, strict=True):
        if text is None:
            raise source.wrong(f"{source.title} holds no text")
    return tokenizer, trained, [text for text in begins if text is not None]


def prepare(recipe: Recipe, runs_dir: Path) -> tuple[preparation.Prepared, Callable[[], Schedule]]:
    """Fill the cache with what a run of this recipe reads, as that run does; and what lays its phases over the data.

    Needs no model weights and no GPU. Raises what the run would raise for its tokenizer and its data.
    """
    config: Pretrain = recipe.config
    inputs = Inputs(recipe, runs_dir)
    cache = run_dir.locate(recipe, runs_dir).cache
    model_path = None if config.model.config is not None else inputs.folder(config.model, "model")
    before = _continued(recipe, inputs)
    sources = inputs.datasets(list(config.data.datasets))
    held_out = inputs.validation(config.data.validation)
    tokenizer = _tokenizer(config, inputs, sources, cache, model_path)
    mix = _mix(config, preparation.Text(sources, held_out, frozenset(inputs.came)), tokenizer, cache)
    return preparation.Prepared(sources, mix.stores, config.data.max_length), lambda: _schedule(recipe, mix, tokenizer, (before, cache))


def _continued(recipe: Recipe, inputs: Inputs) -> Position | None:
    """Where the data go on, for `data.continue_from`."""
    path = recipe.config.data.continue_from
    if path is None:
        return None
    result = read_json(inputs.run_of(path, "data", "continue_from").path / "result.json")
    if not isinstance(result.get("data_end"), dict):
        raise recipe.problem(
            f"{path} is a {result.get('stage')} recipe and has no position in the data to go on from", "data", "continue_from"
        )
    return Position(**result["data_end"])


def _tokenizer(
    config: Pretrain, inputs: Inputs, sources: list[readers.Located], cache: Path, model_path: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer to train with: the one asked for, a new one trained on this recipe's text, or the model's own."""
    asked = config.tokenizer
    if asked.family is None:
        own = asked.name_or_path is None and asked.output_of is None
        path = model_path if own else inputs.folder(asked, "tokenizer")
        assert path is not None
        return load_tokenizer(path, config.model.revision if own else asked.revision)
    assert asked.vocab_size is not None
    what = [asked.family, asked.vocab_size, [[data_sources.identity(s), s.source.weight] for s in sources]]  # type: ignore[attr-defined]
    folder = cache / f"tokenizer-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"
    with locked(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            trained = bpe_training.train_llama3((text for _, text in data_sources.mixed(sources, None)), asked.vocab_size)
            with whole_folder(folder, replace=False) as aside:
                save_tokenizer(trained, aside)
    return load_tokenizer(str(folder))


def _check_model(
    recipe: Recipe, model_path: str | None, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[PreTrainedTokenizerBase, list[int], list[parameter_groups.Trained], ModelShape]:
    """Refuse a model that cannot be built, take this vocabulary or be split over `context` processes, and phases that would train what it has not.

    Returns the model's own tokenizer, the ids of the tokens that are new to it, what each phase trains, and the model as it will be.
    """
    config: Pretrain = recipe.config
    asked = config.model
    own = tokenizer
    if model_path is None:
        assert asked.config is not None
        try:
            with torch.device("meta"):
                net = loading.build_model(asked.config, tokenizer, config.training.precision, asked.attn_implementation, config.seed)
        except CommandError as error:
            raise recipe.problem(str(error), "model", "config") from None
    else:
        net = loading.skeleton(model_path, asked.attn_implementation, asked.revision)
        own = load_tokenizer(model_path, asked.revision)
        loading.check_sizes(net, own, model_path)
        if not same_vocabulary(own, tokenizer):
            check_swap(own, tokenizer, config.tokenizer.new_embeddings)
            extras.check_word_vectors(config.tokenizer.new_embeddings)
    if config.training.use_liger_kernel:
        liger_kernels.check(recipe, net.config.model_type)
    if config.training.fused_linear_cross_entropy == "torch":
        try:
            chunked_loss.check(net)
        except CommandError as error:
            raise recipe.problem(f"PyTorch's chunked loss: {error}", "training", "fused_linear_cross_entropy") from None
    if context > 1 and (why := loading.unsplittable(net)):
        raise recipe.problem(f"the accelerate config splits sequences over processes, and this model {why}", "model")
    limit = getattr(net.config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        raise recipe.problem(
            f"data.max_length = {config.data.max_length:,} is more than the model's {limit:,} positions", "data", "max_length"
        )
    new = new_tokens.find(model_path, own, tokenizer)
    trained = []
    for i, phase in enumerate(config.phases):
        try:
            trained.append(parameter_groups.freeze(net, phase.trainable_parameters, new))
        except CommandError as error:
            raise recipe.problem(str(error), "phases", i, "trainable_parameters") from None
    return own, new, trained, run_estimate.shape(net.config, _rows(config, net, own, tokenizer), len(new))


def _rows(config: Pretrain, net: PreTrainedModel, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that the embeddings will have."""
    kept = same_vocabulary(own, tokenizer)
    rows = net.get_input_embeddings().weight.shape[0] if kept else rows_needed(tokenizer)
    multiple = config.tokenizer.pad_to_multiple_of or 1
    return -(-int(rows) // multiple) * multiple


def _mix(config: Pretrain, text: preparation.Text, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Mix:
    """The sources, tokenised (once, into the cache), without duplicates, and mixed by weight or temperature."""
    data, stores = config.data, preparation.stores(config, text, tokenizer, cache)
    weights = [source.weight for source in data.datasets]
    if data.sampling_temperature is not None:
        weights = temperature_weights(stores, data.sampling_temperature)
    once = data.stopping_strategy == "all_exhausted_without_replacement"
    limits = [1.0 if source.max_epochs is None else source.max_epochs for source in data.datasets] if once else None
    return Mix(stores, weights, config.seed, borders(tokenizer).count, limits)


def _schedule(recipe: Recipe, mix: Mix, tokenizer: PreTrainedTokenizerBase, given: tuple[Position | None, Path]) -> Schedule:
    """The phases laid over the mix; `given`: where the data go on, and the cache.

    Refused where they cannot go on from there, where the text ends before a phase does, or a source would be read too often.
    """
    config: Pretrain = recipe.config
    before, cache = given
    how = packing(config.data, tokenizer)
    sequences = layout(mix, how, before.start if before else 0, cache)
    if before is not None and before.fingerprint != sequences.fingerprint:
        message = "the data cannot go on from there: datasets, weights, validation, seed or tokenizer differ from that run's, or the way to mix or pack"
        raise recipe.problem(message, "data", "continue_from")
    try:
        schedule = plan(sequences, how, config.phases, config.training.global_batch_size)
    except TextEnds as error:
        raise recipe.problem(str(error), "phases", error.nth) from None
    if mix.limits is not None:
        return schedule
    problems: list[Problem] = []
    for i, (source, stored, epochs) in enumerate(zip(config.data.datasets, mix.stores, schedule.epochs, strict=True)):
        if source.max_epochs is not None and epochs > source.max_epochs + 1 / stored.documents:
            place = recipe.place("data", "datasets", i, "max_epochs")
            often = f"would be gone through {epochs:.2f} times, and max_epochs is {source.max_epochs:g}"
            problems.append(Problem(place, f"{source.path} {often}: add text, lower its weight or shorten the phases"))
    if problems:
        raise RecipeError(problems)
    return schedule


def _describe(job: Job, sources: list[readers.Located]) -> None:
    schedule = job.schedule
    for source, data, share, epochs in zip(sources, schedule.mix.stores, schedule.mix.shares, schedule.epochs, strict=True):
        size = f"{data.documents:,} documents, {data.bytes:,} bytes, {data.count:,} tokens"
        out = preparation.left_out(data)
        say(f"  {source.title}: {size}; {share:.0%} of the text, {epochs:.2f} epochs{out}", job.backend.main)


def _start(job: Job, own: PreTrainedTokenizerBase) -> Start:
    """How new embeddings start. What that takes to find out is found out once and cached: a process may wait for another here."""
    method, composed = job.config.tokenizer.new_embeddings, None
    if method in extras.WORD_VECTOR_METHODS and not same_vocabulary(own, job.tokenizer):
        composed = word_vectors.compose(job.schedule.mix, job.place.cache, method, shared_tokens(own, job.tokenizer))
    return Start(method, job.config.seed, composed)


def _begin(job: Job, model_path: str | None, own: PreTrainedTokenizerBase, start: Start) -> PreTrainedModel:
    """The model before the first step, in this tokenizer's vocabulary; measured before and after the change."""
    config, asked = job.config, job.config.model
    if model_path is None:
        assert asked.config is not None
        net = loading.build_model(asked.config, job.tokenizer, config.training.precision, asked.attn_implementation, config.seed)
        swap = _padded(job, net, None)
        job.record.note(vocabulary=asdict(swap) if swap else None, parameters=loading.count(net))
        return net
    net = loading.load_model(model_path, config.training.precision, asked.attn_implementation, asked.revision)
    if config.training.fused_linear_cross_entropy == "torch":
        chunked_loss.chunk(net)
    job.measure("base", net.to(PartialState().device), own)
    same = same_vocabulary(own, job.tokenizer)
    swap = _padded(job, net, None if same else swap_vocabulary(net, own, job.tokenizer, start))
    if config.training.fused_linear_cross_entropy == "torch":
        chunked_loss.chunk(net)  # the head is another one now
    if swap is not None:
        say(f"  vocabulary {swap}", job.backend.main)
    if not same:
        job.measure("new_vocabulary", net, job.tokenizer)
    job.record.note(vocabulary=asdict(swap) if swap else None, parameters=loading.count(net))
    return net


def _padded(job: Job, net: PreTrainedModel, swap: Swap | None) -> Swap | None:
    """Pad the model's vocabulary as the recipe asks; what became of the vocabulary, padding included, or None for nothing."""
    asked, tokens = job.config.tokenizer, len(job.tokenizer)
    if asked.pad_to_multiple_of is None:
        return swap
    padding = pad_vocabulary(net, rows_needed(job.tokenizer), asked.pad_to_multiple_of)
    return replace(swap or Swap(tokens, tokens, tokens, 0, 0, 0, asked.new_embeddings), padding=padding)


def _result(job: Job, sources: list[readers.Located]) -> dict[str, Any]:
    schedule, record = job.schedule, job.record
    data = [
        {
            **preparation.told(source, stored),
            "share": round(share, 4),
            "epochs": round(epochs, 3),
        }
        for source, stored, share, epochs in zip(sources, schedule.mix.stores, schedule.mix.shares, schedule.epochs, strict=True)
    ]
    window = f"windows of at most {job.config.data.max_length} tokens that overlap by half"
    return {
        "stage": "pretrain",
        "parameters": record.data.get("parameters"),
        "vocabulary": record.data.get("vocabulary"),
        "vocab_size": len(job.tokenizer),
        "bpb": record.data["bpb"],
        "phases": record.data["phases"],
        "data": data,
        "data_end": asdict(schedule.end),
        "bytes": schedule.bytes,
        "definitions": {
            "bpb": f"sum of -log2 p over all tokens of the held-out text / its UTF-8 bytes; BOS is context, EOS is not asked for, {window}"
        },
    }
