"""Stage pretrain: a base model (or a new one), its vocabulary, phases of training on text, bits per byte before and after."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.parts import auxiliary, corpus, liger, metrics, model, phases, prepared, run_dir, training, vocabulary
from azrecipe.parts.backend import Backend
from azrecipe.parts.embeddings import Start, Swap, check_swap, pad_vocabulary, shared_tokens, swap_vocabulary
from azrecipe.parts.files import locked, read_json, whole_folder, write_json
from azrecipe.parts.mixing import Mix
from azrecipe.parts.packing import borders, collate
from azrecipe.parts.run_dir import connect
from azrecipe.parts.schedule import Position, Schedule, plan
from azrecipe.parts.sources import Inputs
from azrecipe.parts.watching import Meter, say
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Pretrain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Texts = Mapping[str, list[str]]


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Load, check, adapt the vocabulary, train phase after phase, measure, save."""
    config: Pretrain = recipe.config
    place = run_dir.locate(recipe, runs_dir, backend.main)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    training.check(config.training, backend)
    model_path = None if config.model.config is not None else inputs.folder(config.model, "model")
    before = _continued(recipe, inputs)
    sources = inputs.datasets(list(config.data.datasets))
    held_out = inputs.validation(config.data.validation)
    tokenizer = _tokenizer(config, inputs, sources, place.cache, model_path)
    run_dir.check_same(recipe, place, inputs.found)
    own = _check_model(recipe, model_path, tokenizer)
    text = prepared.Text(sources, held_out, frozenset(inputs.came))
    schedule = _schedule(recipe, _mix(config, text, tokenizer, place.cache), tokenizer, before)

    with run_dir.opened(recipe, place, inputs.found):
        record = Record(place)  # read by every process before the process group exists, so that all agree
        job = Job(config, place, backend, tokenizer, held_out, schedule, record)
        _describe(job, sources)
        todo = [i for i, phase in enumerate(schedule.phases) if not record.done(phase.name)]
        start = _start(job, own) if len(todo) == len(schedule.phases) else None
        connect(place)  # the process group starts here: nothing above made one process wait for another inside it
        net = _begin(job, model_path, own, start) if start is not None else None
        for i in todo:
            if net is None:
                net = model.load_model(str(job.folder(i - 1)), config.training.precision, config.model.attn_implementation)
            place.need(14 * model.count(net), "writing checkpoints")  # weights and optimizer, one more than is kept
            _train(job, net, i)
            net = None
        place.finish(_result(job, sources))
    return read_json(place.path / "result.json") or {}


def prepare(recipe: Recipe, runs_dir: Path) -> tuple[prepared.Prepared, Callable[[], Schedule]]:
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
    mix = _mix(config, prepared.Text(sources, held_out, frozenset(inputs.came)), tokenizer, cache)
    return prepared.Prepared(sources, mix.stores, config.data.max_length), lambda: _schedule(recipe, mix, tokenizer, before)


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
    config: Pretrain, inputs: Inputs, sources: list[corpus.Located], cache: Path, model_path: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer to train with: the one asked for, a new one trained on this recipe's text, or the model's own."""
    asked = config.tokenizer
    if asked.family is None:
        own = asked.name_or_path is None and asked.output_of is None
        path = model_path if own else inputs.folder(asked, "tokenizer")
        assert path is not None
        return vocabulary.load_tokenizer(path, config.model.revision if own else asked.revision)
    assert asked.vocab_size is not None
    what = [asked.family, asked.vocab_size, [[corpus.identity(s), s.source.weight] for s in sources]]  # type: ignore[attr-defined]
    folder = cache / f"tokenizer-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}"
    with locked(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            trained = vocabulary.train_llama3((text for _, text in corpus.mixed(sources, None)), asked.vocab_size)
            with whole_folder(folder, replace=False) as aside:
                vocabulary.save_tokenizer(trained, aside)
    return vocabulary.load_tokenizer(str(folder))


def _check_model(recipe: Recipe, model_path: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Refuse a model that cannot be built or take this vocabulary, and phases that would train what it has not.

    Returns the model's own tokenizer.
    """
    config: Pretrain = recipe.config
    asked = config.model
    own = tokenizer
    if model_path is None:
        assert asked.config is not None
        try:
            with torch.device("meta"):
                net = model.build_model(asked.config, tokenizer, config.training.precision, asked.attn_implementation, config.seed)
        except CommandError as error:
            raise recipe.problem(str(error), "model", "config") from None
    else:
        net = model.skeleton(model_path, asked.attn_implementation, asked.revision)
        own = vocabulary.load_tokenizer(model_path, asked.revision)
        model.check_sizes(net, own, model_path)
        if not vocabulary.same_vocabulary(own, tokenizer):
            check_swap(own, tokenizer, config.tokenizer.new_embeddings)
            auxiliary.check(config.tokenizer.new_embeddings)
    if config.training.use_liger_kernel:
        liger.check(net.config.model_type)
    limit = getattr(net.config, "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        raise recipe.problem(
            f"data.max_length = {config.data.max_length:,} is more than the model's {limit:,} positions", "data", "max_length"
        )
    for i, phase in enumerate(config.phases):
        try:
            phases.freeze(net, phase.trainable_parameters)
        except CommandError as error:
            raise recipe.problem(str(error), "phases", i, "trainable_parameters") from None
    return own


def _mix(config: Pretrain, text: prepared.Text, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Mix:
    """The sources, tokenised (once, into the cache), without duplicates, and mixed by weight."""
    stores = prepared.stores(config, text, tokenizer, cache)
    return Mix(stores, [source.weight for source in config.data.datasets], config.seed, borders(tokenizer).count)


def _schedule(recipe: Recipe, mix: Mix, tokenizer: PreTrainedTokenizerBase, before: Position | None) -> Schedule:
    """The phases laid over the mix; refused where the data cannot go on from `before` or a source would be read too often."""
    config: Pretrain = recipe.config
    if before is not None and before.fingerprint != mix.fingerprint:
        message = "the data cannot go on from there: datasets, weights, validation, seed or tokenizer differ from that run's"
        raise recipe.problem(message, "data", "continue_from")
    batch = (config.training.global_batch_size, config.data.max_length)
    schedule = plan(mix, borders(tokenizer), config.phases, batch, before.token if before else 0)
    problems: list[Problem] = []
    for i, (source, stored, epochs) in enumerate(zip(config.data.datasets, mix.stores, schedule.epochs, strict=True)):
        if source.max_epochs is not None and epochs > source.max_epochs + 1 / stored.documents:
            place = recipe.place("data", "datasets", i, "max_epochs")
            often = f"would be gone through {epochs:.2f} times, and max_epochs is {source.max_epochs:g}"
            problems.append(Problem(place, f"{source.path} {often}: add text, lower its weight or shorten the phases"))
    if problems:
        raise RecipeError(problems)
    return schedule


def _describe(job: Job, sources: list[corpus.Located]) -> None:
    schedule = job.schedule
    for source, data, share, epochs in zip(sources, schedule.mix.stores, schedule.mix.shares, schedule.epochs, strict=True):
        size = f"{data.documents:,} documents, {data.bytes:,} bytes, {data.count:,} tokens"
        out = prepared.left_out(data)
        say(f"  {source.title}: {size}; {share:.0%} of the text, {epochs:.2f} epochs{out}", job.backend.main)


class Record:
    """phases.json: what earlier processes of this run have measured and finished. One process writes."""

    def __init__(self, place: run_dir.RunDir) -> None:
        self.place = place
        self.file = place.path / "phases.json"
        self.data: dict[str, Any] = read_json(self.file) or {"bpb": {}, "phases": {}}

    def done(self, phase: str) -> bool:
        return phase in self.data["phases"]

    def note(self, **changes: Any) -> None:
        self.data.update(changes)
        if self.place.main:
            write_json(self.file, self.data)


@dataclass(frozen=True)
class Job:
    """What every step of this stage looks at."""

    config: Pretrain
    place: run_dir.RunDir
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    held_out: Texts
    schedule: Schedule
    record: Record

    def folder(self, nth: int) -> Path:
        """Where the model of a phase is saved: phases/<name>, the last one's in final/."""
        last = nth + 1 == len(self.schedule.phases)
        return self.place.final if last else self.place.path / "phases" / self.schedule.phases[nth].name

    def bpb(self, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Bits per byte on each validation set."""
        size, length = self.config.training.per_device_eval_batch_size, self.config.data.max_length
        mixed = self.config.training.precision == "bf16_mixed"  # as it trains, so that before and after are measured alike
        with torch.autocast(PartialState().device.type, torch.bfloat16, enabled=mixed):
            return {name: round(metrics.bits(net, tokenizer, texts, length, size).per_byte, 5) for name, texts in self.held_out.items()}

    def measure(self, name: str, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Record BPB under a name, once; every process takes part."""
        found = self.record.data["bpb"].get(name) or self.bpb(net, tokenizer)
        self.record.note(bpb={**self.record.data["bpb"], name: found})
        say(f"  bits per byte, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), self.backend.main)


def _start(job: Job, own: PreTrainedTokenizerBase) -> Start:
    """How new embeddings start. What that takes to find out is found out once and cached: a process may wait for another here."""
    method, composed = job.config.tokenizer.new_embeddings, None
    if method in auxiliary.METHODS and not vocabulary.same_vocabulary(own, job.tokenizer):
        composed = auxiliary.compose(job.schedule.mix, job.place.cache, method, shared_tokens(own, job.tokenizer))
    return Start(method, job.config.seed, composed)


def _begin(job: Job, model_path: str | None, own: PreTrainedTokenizerBase, start: Start) -> PreTrainedModel:
    """The model before the first step, in this tokenizer's vocabulary; measured before and after the change."""
    config, asked = job.config, job.config.model
    if model_path is None:
        assert asked.config is not None
        net = model.build_model(asked.config, job.tokenizer, config.training.precision, asked.attn_implementation, config.seed)
        swap = _padded(job, net, None)
        job.record.note(vocabulary=asdict(swap) if swap else None, parameters=model.count(net))
        return net
    net = model.load_model(model_path, config.training.precision, asked.attn_implementation, asked.revision)
    job.measure("base", net.to(PartialState().device), own)
    same = vocabulary.same_vocabulary(own, job.tokenizer)
    swap = _padded(job, net, None if same else swap_vocabulary(net, own, job.tokenizer, start))
    if swap is not None:
        say(f"  vocabulary {swap}", job.backend.main)
    if not same:
        job.measure("new_vocabulary", net, job.tokenizer)
    job.record.note(vocabulary=asdict(swap) if swap else None, parameters=model.count(net))
    return net


def _padded(job: Job, net: PreTrainedModel, swap: Swap | None) -> Swap | None:
    """Pad the model's vocabulary as the recipe asks; what became of the vocabulary, padding included, or None for nothing."""
    asked, tokens = job.config.tokenizer, len(job.tokenizer)
    if asked.pad_to_multiple_of is None:
        return swap
    padding = pad_vocabulary(net, vocabulary.rows_needed(job.tokenizer), asked.pad_to_multiple_of)
    return replace(swap or Swap(tokens, tokens, tokens, 0, 0, 0, asked.new_embeddings), padding=padding)


class TextTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer that measures bits per byte instead of a loss a token."""

    def __init__(self, job: Job, **arguments: Any) -> None:
        self.job = job
        super().__init__(**arguments, eval_dataset=dict(job.held_out))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """BPB on each validation set, logged as eval_<name>_bpb."""
        found = {f"eval_{name}_bpb": value for name, value in self.job.bpb(_whole(self, self.job), self.job.tokenizer).items()}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)  # type: ignore[has-type]
        return found


def _whole(trainer: Trainer, job: Job) -> PreTrainedModel:
    """The model to measure: below DDP's wrapping, whose forward expects a backward; sharded ones as they are."""
    return trainer.model_wrapped if job.backend.sharded else training.unwrapped(trainer)


def _train(job: Job, net: PreTrainedModel, nth: int) -> None:
    """Train one phase, measure, and save its model where the next phase, or the reader, finds it."""
    config, planned, main = job.config, job.schedule.phases[nth], job.backend.main
    trained = phases.freeze(net, planned.phase.trainable_parameters)
    shares = ", ".join(f"{pattern} {count:,}" for pattern, count in trained.by_pattern.items())
    say(f"phase {planned.name}: trains {trained.trainable:,} of {trained.total:,} parameters ({shares})", main)
    net.config.use_cache = False
    data = job.schedule.dataset(nth)
    loop = training.Loop(
        planned.name, job.place.path, job.place.checkpoints / planned.name, planned.steps, planned.phase.learning_rate, config.seed
    )
    meter = Meter(planned.name, job.schedule.tokens_per_step, lambda step: data.bytes_until(step * config.training.global_batch_size))
    arguments = training.arguments(config.training, loop, job.backend)

    def make(callbacks: list[Any]) -> Trainer:
        args = training.checked(TrainingArguments, **arguments, train_sampling_strategy="sequential")
        return TextTrainer(job, model=net, train_dataset=data, data_collator=collate, callbacks=callbacks, args=args)

    trainer, happened = training.train(make, loop, meter, job.backend, config.training.save_total_limit)
    job.measure(planned.name, _whole(trainer, job), job.tokenizer)
    state = training.whole_state(trainer, job.backend)
    net = training.unwrapped(trainer)
    net.config.use_cache = True
    if main:
        model.save_model(net, job.tokenizer, job.folder(nth), state)
    happened |= {
        "tokens": planned.steps * job.schedule.tokens_per_step,
        "bytes": data.bytes_until(len(data)),
        "trainable_parameters": trained.trainable,
        "learning_rate": planned.phase.learning_rate,
    }
    job.record.note(phases={**job.record.data["phases"], planned.name: happened})
    if main and nth + 1 < len(job.schedule.phases):
        shutil.rmtree(loop.folder, ignore_errors=True)  # the phase is done: nothing resumes from inside it
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def _result(job: Job, sources: list[corpus.Located]) -> dict[str, Any]:
    schedule, record = job.schedule, job.record
    data = [
        {
            **prepared.told(source, stored),
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
