"""Train one phase of pretraining on packed text.

The model is measured in bits per byte and saved where the next phase finds it.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

from azrecipe.data.packing import PackedText, build_collator
from azrecipe.data.phase_schedule import PhaseSchedule
from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.evaluation import bits_per_byte
from azrecipe.evaluation.token_losses import explain_evaluation_memory
from azrecipe.modeling import chunked_loss, frozen_weights, liger_kernels, loading, parameter_groups
from azrecipe.modeling.dtypes import PARAM_DTYPES
from azrecipe.modeling.row_gradient_mask import RowGradientMask
from azrecipe.recipe import optimizer_settings
from azrecipe.recipe.types import PretrainConfig
from azrecipe.runs.run_dir import RunDir
from azrecipe.training import checkpoints, main_process_loading, precision, throughput
from azrecipe.training import trainer as training_trainer
from azrecipe.training.async_checkpoint import AsyncCheckpointMixin, create_checkpoint_writer
from azrecipe.training.bad_step_guard import BadStepGuard, BadStepGuardMixin
from azrecipe.training.learning_rates import LearningRatesMixin
from azrecipe.training.monitor import LoopUnits
from azrecipe.utils.atomic_files import list_file_sizes, read_json_object, write_json
from azrecipe.utils.console import print_progress
from azrecipe.utils.output_checksums import compute_folder_checksums, find_changed_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HeldOutTexts = Mapping[str, list[str]]


class PhaseRecord:
    """phases.json: what this run has measured and finished.

    One process writes, and all use what it read.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.file = run_dir.path / "phases.json"
        self.data: dict[str, Any] = local_storage.broadcast_from_main(read_json_object(self.file)) or {"bpb": {}, "phases": {}}

    def is_finished(self, phase: str) -> bool:
        """Tell whether a phase is finished."""
        return phase in self.data["phases"]

    def finish_phase(self, phase: str, summary: dict[str, Any], folder: Path) -> None:
        """Record a finished phase and the files of its model."""
        files = {**self.data.get("files", {}), phase: list_file_sizes(folder)}
        checksums = {**self.data.get("checksums", {}), phase: compute_folder_checksums(folder) if self.run_dir.main else {}}
        self.update(phases={**self.data["phases"], phase: summary}, files=files, checksums=checksums)

    def forget_incomplete(self, phase_folders: Sequence[tuple[str, Path]]) -> None:
        """Forget the last finished phases whose models are not what was written.

        Files may be damaged. Where they are uploaded one by one, the record may also arrive before them.

        Args:
            phase_folders: The phases' names and their models' folders.
        """
        finished = [(name, folder) for name, folder in phase_folders if self.is_finished(name)]
        while finished:
            name, folder = finished.pop()
            problem = local_storage.broadcast_from_main(self._find_damage(name, folder))
            if not problem:
                return
            print_progress(f"phase {name}: {problem}, so the phase is not finished", self.run_dir.main)
            self.update(phases={key: value for key, value in self.data["phases"].items() if key != name})

    def _find_damage(self, phase: str, folder: Path) -> str:
        """Say why a phase's model cannot be used; "" if it can.

        Records of earlier versions have no checksums.
        """
        if not folder.is_dir():
            return f"there is no {folder}"
        sizes = self.data.get("files", {}).get(phase)
        if local_storage.storage_is_local() and sizes is not None and list_file_sizes(folder) != sizes:
            return f"its model in {folder} is incomplete"
        changed = find_changed_file(folder, self.data.get("checksums", {}).get(phase, {}))
        return "" if changed is None else f"{folder / changed} is missing or not what was written (its checksum differs)"

    def update(self, **changes: Any) -> None:
        """Change fields of the record and write it."""
        self.data.update(changes)
        if self.run_dir.main:
            write_json(self.file, self.data)


@dataclass(frozen=True)
class PretrainJob:
    """What the functions of pretraining need."""

    config: PretrainConfig
    run_dir: RunDir
    backend: Backend
    tokenizer: PreTrainedTokenizerBase
    held_out: HeldOutTexts
    schedule: PhaseSchedule
    record: PhaseRecord
    new_token_ids: list[int]
    scorers: dict[str, bits_per_byte.TextScorer] = field(default_factory=dict)  # of the held-out texts, tokenised at the first measurement

    def model_folder(self, phase_index: int) -> Path:
        """Get a phase's model folder: phases/<name>, or final/ for the last."""
        is_last = phase_index + 1 == len(self.schedule.phases)
        return self.run_dir.final_dir if is_last else self.run_dir.path / "phases" / self.schedule.phases[phase_index].name

    def measure_bpb(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Measure bits per byte on each validation set."""
        batch_size, length = self.config.training.per_device_eval_batch_size, self.config.data.max_length
        use_autocast = self.config.training.precision == "bf16_mixed"  # as in training, so that before and after are comparable
        if tokenizer is not self.tokenizer:  # the base model's, which measures once
            scorers = {name: bits_per_byte.TextScorer(tokenizer, texts, length, batch_size) for name, texts in self.held_out.items()}
        else:
            for name, texts in self.held_out.items():
                if name not in self.scorers:
                    self.scorers[name] = bits_per_byte.TextScorer(tokenizer, texts, length, batch_size)
            scorers = self.scorers
        with (
            torch.autocast(PartialState().device.type, torch.bfloat16, enabled=use_autocast),
            explain_evaluation_memory("training.per_device_eval_batch_size", batch_size),
        ):
            return {name: round(scorer.score(model).bits_per_byte, 5) for name, scorer in scorers.items()}

    def record_bpb(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Record bits per byte under a name, once.

        Every process must call this.
        """
        bits_by_name = self.record.data["bpb"].get(name) or self.measure_bpb(model, tokenizer)
        self.record.update(bpb={**self.record.data["bpb"], name: bits_by_name})
        print_progress(
            f"  bits per byte, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in bits_by_name.items()), self.backend.main
        )


class TextTrainer(AsyncCheckpointMixin, BadStepGuardMixin, LearningRatesMixin):
    """A Trainer that measures bits per byte.

    It guards its steps and writes checkpoints in a thread.
    """

    def __init__(self, job: PretrainJob, trainable: parameter_groups.TrainableParameters, guard: BadStepGuard, **arguments: Any) -> None:
        self.job, self.trainable = job, trainable
        self.exact_weights: dict[str, torch.Tensor] = {}
        self.predicted_tokens: Any = 0  # since the last log line, on all processes. A tensor on a GPU, so that no step waits
        super().__init__(**arguments, eval_dataset=dict(job.held_out))
        self.loss_arguments = liger_kernels.build_loss_arguments(self.model)  # of the model's forward, beside a batch
        self.add_callback(guard)
        self.guard, guard.trainer = guard, self
        self.checkpoint_writer = create_checkpoint_writer(self, job.backend, job.config.training.async_sharded_checkpoints)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Return a step's batches, and the number of labels on all processes."""
        batches, count = super().get_batch_samples(*args)
        self.predicted_tokens = self.predicted_tokens + (0 if count is None else count)
        return batches, count

    def take_predicted_tokens(self) -> int:
        """Return the tokens that were predicted since the last call."""
        count, self.predicted_tokens = int(self.predicted_tokens), 0
        return count

    def get_decay_parameter_names(self, model: PreTrainedModel) -> list[str]:
        """List the parameters with weight decay, by `parameter_groups.list_weight_decay_parameters`."""
        return parameter_groups.list_weight_decay_parameters(model, self.trainable.masked_matrices)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch.

        With context parallelism a process has a front and a back piece of a sequence. transformers takes the jump in positions for packing
        and makes a mask of [tokens, tokens]; Accelerate drops it in each layer. An explicit mask avoids making it.
        """
        inputs = {**inputs, **self.loss_arguments}
        if self.job.backend.context_parallel_size > 1:
            inputs = {**inputs, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs["input_ids"].device)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure bits per byte of each validation set, logged as eval_<name>_bpb."""
        metrics = {
            f"eval_{name}_bpb": value
            for name, value in self.job.measure_bpb(
                training_trainer.get_evaluation_model(self, self.job.backend), self.job.tokenizer
            ).items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics


def remove_finished_checkpoints(job: PretrainJob) -> None:
    """Delete the checkpoints of finished phases, from which nothing resumes.

    With local storage the last finished phase's newest one stays until the next phase is done: its model may not be uploaded yet.
    """
    names = [phase.name for phase in job.schedule.phases]
    finished = [name for name in names[:-1] if job.record.is_finished(name)]
    if local_storage.storage_is_local() and finished and not job.record.is_finished(names[-1]):
        last_folder = job.run_dir.checkpoints_dir / finished.pop()
        if job.backend.main:
            checkpoints.rotate(last_folder, 1)
        checkpoints.mirror_deletions(last_folder, job.backend.main)
    if local_storage.is_writer(job.backend.main):
        for name in finished:
            shutil.rmtree(job.run_dir.checkpoints_dir / name, ignore_errors=True)


def release_memory() -> None:
    """Free the memory of a finished phase.

    Its trainer and callbacks refer to each other, so only a garbage collection frees them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def required_disk_bytes(job: PretrainJob, model: PreTrainedModel, phase_index: int) -> int:
    """Estimate the disk bytes that a phase still writes.

    These are its checkpoints, one more than is kept, and its model.
    """
    training, planned_phase = job.config.training, job.schedule.phases[phase_index]
    bytes_per_number: int = PARAM_DTYPES[training.precision].itemsize
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint_bytes = bytes_per_number * (loading.count_parameters(model) + 2 * num_trainable)  # weights, and two moments of what trains
    num_existing = len(checkpoints.list_complete(job.run_dir.checkpoints_dir / planned_phase.name))
    num_checkpoints = min(training.save_total_limit + 1, math.ceil(planned_phase.steps / training.save_steps))
    return int(max(num_checkpoints - num_existing, 1) * checkpoint_bytes + bytes_per_number * loading.count_parameters(model))


def train_phase(job: PretrainJob, model: PreTrainedModel, phase_index: int) -> None:
    """Train one phase, measure its model and save it."""
    name, main = job.schedule.phases[phase_index].name, job.backend.main
    trainer, summary = run_phase_loop(job, model, phase_index)
    job.record_bpb(name, training_trainer.get_evaluation_model(trainer, job.backend), job.tokenizer)
    state = training_trainer.gather_state_dict(trainer, job.backend)
    model = training_trainer.unwrap_model(trainer)
    model.config.use_cache = True
    if main:
        frozen_weights.restore_matrices(model, trainer.exact_weights)
        loading.save_model(model, job.tokenizer, job.model_folder(phase_index), state, job.new_token_ids)
    summary |= trainer.checkpoint_writer.timings if trainer.checkpoint_writer else {}
    job.record.finish_phase(name, summary, job.model_folder(phase_index))
    remove_finished_checkpoints(job)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def run_phase_loop(
    job: PretrainJob, model: PreTrainedModel, phase_index: int, more_callbacks: Sequence[TrainerCallback] = ()
) -> tuple[Any, dict[str, Any]]:
    """Run one phase's training loop.

    Args:
        job: What the functions of pretraining need.
        model: The model, trained in place.
        phase_index: The phase.
        more_callbacks: Callbacks beside our own, for benchmarks.

    Returns:
        The trainer, and a summary of the loop for phases.json.
    """
    config, planned_phase, main = job.config, job.schedule.phases[phase_index], job.backend.main
    trainable = parameter_groups.set_trainable_parameters(model, planned_phase.phase.trainable_parameters, job.new_token_ids)
    shares = ", ".join(f"{pattern} {count:,}" for pattern, count in trainable.by_pattern.items())
    print_progress(f"phase {planned_phase.name}: trains {trainable.trainable:,} of {trainable.total:,} parameters ({shares})", main)
    if main and not local_storage.storage_is_local():  # with local storage it happens once all processes have compared theirs
        checkpoints.remove_incomplete(job.run_dir.checkpoints_dir / planned_phase.name)
    job.run_dir.require_disk_space(required_disk_bytes(job, model, phase_index), "the phase's checkpoints and its model")
    model.config.use_cache = False
    exact_weights = {}  # of what is rounded, for the model that is saved
    if precision.rounds_frozen_weights(config.training.precision, job.backend):
        exact_weights = frozen_weights.round_matrices(model, keep_exact=main)
    if config.training.fused_linear_cross_entropy == "torch":
        chunked_loss.enable_chunked_loss(model)
    data = job.schedule.build_dataset(phase_index)
    loop = training_trainer.LoopConfig(
        name=planned_phase.name,
        run_path=job.run_dir.path,
        checkpoint_dir=job.run_dir.checkpoints_dir / planned_phase.name,
        max_steps=planned_phase.steps,
        learning_rate=planned_phase.phase.learning_rate,
        seed=config.seed,
        gradient_bytes=loading.count_trainable_bytes(model),
        profile=config.training.profile,
    )
    batch_size = config.training.global_batch_size
    units = LoopUnits(
        name=planned_phase.name,
        tokens_per_step=job.schedule.tokens_per_step,
        bytes_at=lambda step: data.count_bytes(step * batch_size),
        tokens_at=lambda step: data.count_tokens(step * batch_size),
        sequence_length=config.data.max_length,
        tokens_per_word=throughput.measure_fertility(job.tokenizer, next(iter(job.held_out.values()), [])),
    )
    arguments = training_trainer.build_training_arguments(
        optimizer_settings.merge_phase_settings(config.training, planned_phase.phase), loop, job.backend
    )
    guard = BadStepGuard(job.backend, job.run_dir.path, planned_phase.name, lambda sequence: _list_documents(job, data, sequence))
    guard.skip_bad_steps, guard.spike_factor = config.training.on_bad_loss == "skip", config.training.loss_spike_factor or math.inf

    def build_trainer(callbacks: list[Any]) -> Trainer:
        args = training_trainer.create_training_arguments(TrainingArguments, **arguments, train_sampling_strategy="sequential")
        trainer = TextTrainer(
            job,
            trainable,
            guard,
            model=model,
            train_dataset=data,
            data_collator=build_collator(job.schedule.packing, config.model.attn_implementation, job.backend.context_parallel_size),
            callbacks=[*callbacks, RowGradientMask(trainable, job.backend.strategy), *more_callbacks],
            args=args,
        )
        trainer.exact_weights = exact_weights
        trainer.learning_rates = planned_phase.phase.learning_rates
        main_process_loading.send_weights_when_sharded(trainer, job.backend)
        return trainer

    trainer, summary = training_trainer.train_loop(build_trainer, loop, units, job.backend, config.training)
    return trainer, {
        **summary,
        "tokens": data.count_tokens(len(data)),
        "fill": round(job.schedule.measure_fill(phase_index), 5),
        "bytes": data.count_bytes(len(data)),
        "trainable_parameters": trainable.trainable,
        "learning_rate": planned_phase.phase.learning_rate,
        "skipped_steps": [step + 1 for step in guard.skipped_steps],
    }


def _list_documents(job: PretrainJob, data: PackedText, sequence: int) -> list[dict[str, Any]]:
    """List the documents of a training sequence for the bad-step log.

    A document has its source, its number in it (after held-out and filtered ones are left out) and its beginning.
    """
    documents = []
    for source, index, _first, tokens in data.list_documents(sequence):
        store = job.schedule.mix.stores[source]
        beginning = job.tokenizer.decode(store.read_document(index)[:32].tolist())
        number = index if store.document_indices is None else int(store.document_indices[index])
        documents.append({"source": job.config.data.datasets[source].path, "document": number, "tokens": tokens, "begins": beginning})
    return documents
