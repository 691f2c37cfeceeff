"""How one phase of pretraining is trained on packed text: measured in bits per byte, watched, saved where the next one finds it."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from azrecipe.data.packing import PackedText, collate
from azrecipe.data.phase_schedule import Schedule
from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.evaluation import bits_per_byte
from azrecipe.modeling import chunked_loss, loading, parameter_groups
from azrecipe.modeling.dtypes import STORED
from azrecipe.modeling.row_gradient_mask import RowMask
from azrecipe.recipe import optimizer_settings
from azrecipe.recipe.types import Pretrain
from azrecipe.runs import run_dir
from azrecipe.training import checkpoints, throughput
from azrecipe.training import trainer as training_trainer
from azrecipe.training.async_checkpoint import BackgroundSaving, Saver
from azrecipe.training.bad_step_guard import Guard, GuardedTrainer
from azrecipe.training.monitor import Meter
from azrecipe.utils.atomic_files import file_sizes, read_json, write_json
from azrecipe.utils.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Texts = Mapping[str, list[str]]


class Record:
    """phases.json: what earlier processes of this run have measured and finished. One process writes, and all go by what it reads."""

    def __init__(self, place: run_dir.RunDir) -> None:
        self.place = place
        self.file = place.path / "phases.json"
        self.data: dict[str, Any] = local_storage.from_main(read_json(self.file)) or {"bpb": {}, "phases": {}}

    def done(self, phase: str) -> bool:
        return phase in self.data["phases"]

    def finish(self, phase: str, happened: dict[str, Any], folder: Path) -> None:
        """Note a phase and the files of its model."""
        files = {**self.data.get("files", {}), phase: file_sizes(folder)}
        self.note(phases={**self.data["phases"], phase: happened}, files=files)

    def forget_torn(self, order: Sequence[tuple[str, Path]]) -> None:
        """Where files are uploaded one by one, forget the last finished phases whose models are not whole: this note was there before them."""
        done = [(name, folder) for name, folder in order if self.done(name)]
        while local_storage.apart() and done:
            name, folder = done.pop()
            wanted = self.data.get("files", {}).get(name)
            if local_storage.from_main(folder.is_dir() and (wanted is None or file_sizes(folder) == wanted)):
                return
            say(f"phase {name}: its model in {folder} is not whole, so the phase is not done", self.place.main)
            self.note(phases={key: value for key, value in self.data["phases"].items() if key != name})

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
    new: list[int]

    def folder(self, nth: int) -> Path:
        """Where the model of a phase is saved: phases/<name>, the last one's in final/."""
        last = nth + 1 == len(self.schedule.phases)
        return self.place.final if last else self.place.path / "phases" / self.schedule.phases[nth].name

    def bpb(self, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Bits per byte on each validation set."""
        size, length = self.config.training.per_device_eval_batch_size, self.config.data.max_length
        mixed = self.config.training.precision == "bf16_mixed"  # as it trains, so that before and after are measured alike
        with torch.autocast(PartialState().device.type, torch.bfloat16, enabled=mixed):
            return {
                name: round(bits_per_byte.bits(net, tokenizer, texts, length, size).per_byte, 5) for name, texts in self.held_out.items()
            }

    def measure(self, name: str, net: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Record BPB under a name, once; every process takes part."""
        found = self.record.data["bpb"].get(name) or self.bpb(net, tokenizer)
        self.record.note(bpb={**self.record.data["bpb"], name: found})
        say(f"  bits per byte, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), self.backend.main)


class TextTrainer(BackgroundSaving, GuardedTrainer, training_trainer.FilledGroups):
    """transformers.Trainer that measures bits per byte instead of a loss a token, watches its steps and saves beside training."""

    def __init__(self, job: Job, trained: parameter_groups.Trained, guard: Guard, **arguments: Any) -> None:
        self.job, self.trained = job, trained
        self.predicted: Any = 0  # tokens predicted since the log asked, on all processes: on a GPU a tensor, so that no step waits
        super().__init__(**arguments, eval_dataset=dict(job.held_out))
        self.add_callback(guard)
        self.guard, guard.trainer = guard, self
        self.saver = None if job.backend.sharded else Saver(job.backend)

    def get_batch_samples(self, *given: Any) -> tuple[list[Any], Any]:
        """A step's batches, and the number of their labels on all processes."""
        batches, count = super().get_batch_samples(*given)
        self.predicted = self.predicted + (0 if count is None else count)
        return batches, count

    def take_predicted(self) -> int:
        """The tokens that were predicted since the last call."""
        count, self.predicted = int(self.predicted), 0
        return count

    def get_decay_parameter_names(self, model: PreTrainedModel) -> list[str]:
        """Where weight decay belongs, by `parameter_groups.decayed` instead of by name."""
        return parameter_groups.decayed(model, self.trained.masked)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **more: Any) -> Any:
        """The loss of a batch.

        A process that has a front and a back piece of a sequence has positions that jump, which transformers takes for packing and
        makes a mask of [tokens, tokens]; Accelerate drops it in each layer. A mask that is given is none that is made.
        """
        if self.job.backend.context > 1:
            inputs = {**inputs, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs["input_ids"].device)}
        return super().compute_loss(model, inputs, *given, **more)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """BPB on each validation set, logged as eval_<name>_bpb."""
        found = {
            f"eval_{name}_bpb": value
            for name, value in self.job.bpb(training_trainer.measured(self, self.job.backend), self.job.tokenizer).items()
        }
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)  # type: ignore[has-type]
        return found


def clear(job: Job) -> None:
    """Delete the checkpoints of finished phases: nothing resumes from inside them.

    Where machines are apart the last one's newest stays until the phase after it is done: its model may not be uploaded yet.
    """
    names = [planned.name for planned in job.schedule.phases]
    done = [name for name in names[:-1] if job.record.done(name)]
    if local_storage.apart() and done and not job.record.done(names[-1]):
        kept = job.place.checkpoints / done.pop()
        if job.backend.main:
            checkpoints.rotate(kept, 1)
        checkpoints.follow(kept, job.backend.main)
    if local_storage.writes(job.backend.main):
        for name in done:
            shutil.rmtree(job.place.checkpoints / name, ignore_errors=True)


def release() -> None:
    """Give back what a finished phase held: its trainer and callbacks know each other, and only a collection ends that."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def room(job: Job, net: PreTrainedModel, nth: int) -> int:
    """Bytes of disk that a phase still writes: its checkpoints, one more than is kept, and its model."""
    training_, planned = job.config.training, job.schedule.phases[nth]
    width: int = STORED[training_.precision].itemsize
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    each = width * (loading.count(net) + 2 * trained)  # weights, and two moments of what trains
    there = len(checkpoints.complete(job.place.checkpoints / planned.name))
    most = min(training_.save_total_limit + 1, math.ceil(planned.steps / training_.save_steps))
    return int(max(most - there, 1) * each + width * loading.count(net))


def train_phase(job: Job, net: PreTrainedModel, nth: int) -> None:
    """Train one phase, measure, and save its model where the next phase, or the reader, finds it."""
    config, planned, main = job.config, job.schedule.phases[nth], job.backend.main
    trained = parameter_groups.freeze(net, planned.phase.trainable_parameters, job.new)
    shares = ", ".join(f"{pattern} {count:,}" for pattern, count in trained.by_pattern.items())
    say(f"phase {planned.name}: trains {trained.trainable:,} of {trained.total:,} parameters ({shares})", main)
    if main and not local_storage.apart():  # else once all have told what they have
        checkpoints.remove_torn(job.place.checkpoints / planned.name)
    job.place.need(room(job, net, nth), "the phase's checkpoints and its model")
    net.config.use_cache = False
    if config.training.fused_linear_cross_entropy == "torch":
        chunked_loss.chunk(net)
    data = job.schedule.dataset(nth)
    loop = training_trainer.Loop(
        planned.name, job.place.path, job.place.checkpoints / planned.name, planned.steps, planned.phase.learning_rate, config.seed,
        config.training.profile,
    )  # fmt: skip
    batch = config.training.global_batch_size
    meter = Meter(
        planned.name,
        job.schedule.tokens_per_step,
        lambda step: data.bytes_until(step * batch),
        lambda step: data.tokens_until(step * batch),
        config.data.max_length,
        throughput.tokens_a_word(job.tokenizer, next(iter(job.held_out.values()), [])),
    )
    arguments = training_trainer.arguments(optimizer_settings.of_phase(config.training, planned.phase), loop, job.backend)
    guard = Guard(job.backend, job.place.path, planned.name, lambda sequence: _documents(job, data, sequence))
    guard.skip, guard.factor = config.training.on_bad_loss == "skip", config.training.loss_spike_factor or math.inf

    def make(callbacks: list[Any]) -> Trainer:
        args = training_trainer.checked(TrainingArguments, **arguments, train_sampling_strategy="sequential")
        return TextTrainer(
            job,
            trained,
            guard,
            model=net,
            train_dataset=data,
            data_collator=collate(job.schedule.how, config.model.attn_implementation, job.backend.context),
            callbacks=[*callbacks, RowMask(trained, job.backend.kind)],
            args=args,
        )

    trainer, happened = training_trainer.train(make, loop, meter, job.backend, config.training)
    job.measure(planned.name, training_trainer.measured(trainer, job.backend), job.tokenizer)
    state = training_trainer.whole_state(trainer, job.backend)
    net = training_trainer.unwrapped(trainer)
    net.config.use_cache = True
    if main:
        loading.save_model(net, job.tokenizer, job.folder(nth), state, job.new)
    happened |= {
        "tokens": data.tokens_until(len(data)),
        "fill": round(job.schedule.fill(nth), 5),
        "bytes": data.bytes_until(len(data)),
        "trainable_parameters": trained.trainable,
        "learning_rate": planned.phase.learning_rate,
        "skipped_steps": [step + 1 for step in guard.skipped],
        **(trainer.saver.seconds if trainer.saver else {}),
    }
    job.record.finish(planned.name, happened, job.folder(nth))
    clear(job)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def _documents(job: Job, data: PackedText, sequence: int) -> list[dict[str, Any]]:
    """The documents in a training sequence: source, number among those that it gives (not held out, not filtered away), how they begin."""
    found = []
    for source, document, _first, tokens in data.documents_of(sequence):
        store = job.schedule.mix.stores[source]
        begin = job.tokenizer.decode(store.document(document)[:32].tolist())
        number = document if store.kept is None else int(store.kept[document])
        found.append({"source": job.config.data.datasets[source].path, "document": number, "tokens": tokens, "begins": begin})
    return found
