"""Stage evaluate: several models on the same held-out text, prompts, test conversations and benchmark tasks, side by side.

One process, on the accelerator where there is one. What is measured is kept model by model, and set by set, prompt by prompt, task by
task: a run that was killed goes on from there.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from azrecipe.data.inputs import Inputs
from azrecipe.distributed.backend import Backend, has_accelerator
from azrecipe.distributed.requirements import check_precision
from azrecipe.errors import CommandError, RecipeError
from azrecipe.evaluation import answer_metrics, bits_per_byte, generation, lm_harness, models, output_metrics
from azrecipe.evaluation.answer_metrics import Question
from azrecipe.evaluation.models import Subject
from azrecipe.evaluation.output_metrics import Expected
from azrecipe.modeling import loading
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Evaluate
from azrecipe.runs import run_dir
from azrecipe.utils import bootstrap
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.bootstrap import Resampling, compared
from azrecipe.utils.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 3  # answers that result.json shows; all stand in the models' answers.jsonl
DEFINITIONS = {
    "bpb": "bits per byte: sum of -log2 p over all tokens of the held-out text / its UTF-8 bytes; comparable between tokenizers",
    "fertility": "tokens per white-space separated word, no special tokens",
    "bytes_per_token": "UTF-8 bytes per token, no special tokens",
    "interval": f"{bootstrap.LEVEL} % of {bootstrap.RESAMPLES:,} resamples of documents (or their groups), prompts, conversations; null from a single one",
    "difference": "a model's value minus the baseline's, its interval from the same resamples of both",
    "generations": "of what is written after the prompts: language: share of outputs that lingua says are in the expected language; "
    "language_characters: of their characters; script: share of letters in the expected script; "
    f"repetition: share of {output_metrics.GRAM}-grams of words that have occurred before in the output; "
    "ended: share of outputs that the model ended itself; tokens, words, bytes: mean length of an output",
    "answers": "of answers to held-out conversations: chrf and chrf++ of all together (sacrebleu), rouge_l: mean F measure (rouge_score, Unicode words), "
    "all 0 to 100; and the measures of generations",
    "tasks": "as lm-evaluation-harness reports them, with its standard errors; differences from resamples of a task's questions",
}  # fmt: skip


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Measure model after model; what an interrupted run has measured is not measured again."""
    if not backend.main:
        return {}
    config: Evaluate = recipe.config
    place = run_dir.locate(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)

    checked = check(recipe, inputs)
    found, tokenizers = checked.found, checked.tokenizers

    with run_dir.opened(recipe, place, inputs.found):
        job = Job(config, place.path / "models", checked.held_out, checked.asked, checked.questions, checked.tasks)
        for name, subject in found.items():
            _measure(job, name, subject, tokenizers[name])
        baseline = config.baseline or next(iter(found))
        models = _models(job, found, tokenizers, (baseline, inputs.groups))
        place.finish(
            {
                "stage": "evaluate",
                "baseline": baseline,
                "models": models,
                "validation": {k: _size(texts) for k, texts in checked.held_out.items()},
                "prompts": [generation.title(prompt) for prompt in checked.asked],
                "generation": asdict(config.generation),
                "expected": {"language": config.language, "script": config.script, "decided_between": output_metrics.languages(config)},
                **({"answers": _asked(checked.questions, checked.of, checked.too_long)} if config.answers else {}),
                **({"harness": lm_harness.version(), "tasks": _about(job, found)} if config.tasks else {}),
                "resamples": {"seed": config.seed, "count": bootstrap.RESAMPLES, "level": bootstrap.LEVEL},
                "definitions": DEFINITIONS,
            }
        )
    return read_json(place.path / "result.json") or {}


@dataclass(frozen=True)
class Checked:
    """What a run measures, all that can be refused without a model's weights being refused already.

    `of`: how many conversations are held out, of which `too_long` leave no room for an answer.
    """

    found: Mapping[str, Subject]
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    held_out: Mapping[str, list[str]]
    asked: Sequence[generation.Asked]
    questions: Sequence[Question]
    of: int
    too_long: int
    tasks: lm_harness.Harness


def check(recipe: Recipe, inputs: Inputs) -> Checked:
    """Refuse everything that can be refused before a model is loaded; `inputs` collects what a resume compares."""
    config: Evaluate = recipe.config
    warning = check_precision("bf16_pure" if config.precision == "bfloat16" else "float32", use_liger_kernel=False)
    say(warning, bool(warning))
    output_metrics.check(config)
    lm_harness.needed(config)
    found, tokenizers = models.find(inputs, config.models)
    nets = {name: loading.skeleton(subject.path, revision=subject.revision) for name, subject in found.items()}
    held_out = inputs.validation(config.data.validation)
    asked = [generation.asked(prompt) for prompt in config.prompts]
    limits = {name: getattr(net.config, "max_position_embeddings", None) for name, net in nets.items()}
    _check_prompts(recipe, asked, tokenizers, limits)
    questions, of, too_long = _questions(inputs, config, tokenizers, limits)
    tasks = lm_harness.Harness(recipe)
    if config.tasks:
        _check_tasks(recipe, tasks, tokenizers)
        inputs.found |= tasks.inputs()
    return Checked(found, tokenizers, held_out, asked, questions, of, too_long, tasks)


@dataclass(frozen=True)
class Job:
    """What is measured on, and where what was measured is kept: a folder for each model."""

    config: Evaluate
    folder: Path
    held_out: Mapping[str, list[str]]
    asked: Sequence[generation.Asked]
    questions: Sequence[Question]
    tasks: lm_harness.Harness

    @cached_property
    def detector(self) -> output_metrics.Detector | None:
        """Opened for the first outputs that a language is expected of."""
        codes = output_metrics.languages(self.config)
        return output_metrics.Detector(codes) if codes else None

    def text(self, name: str, dataset: str) -> Path:
        return self.folder / name / "text" / f"{dataset}.json"

    def task(self, name: str, nth: int) -> Path:
        return self.folder / name / "tasks" / f"{nth}.json"

    def written(self, name: str) -> list[tuple[Path, Sequence[generation.Asked]]]:
        """The file of what a model wrote after the prompts and, where there are any, to the questions."""
        answered = [(self.folder / name / "answers.jsonl", [question.messages for question in self.questions])] if self.questions else []
        return [*([(self.folder / name / "prompts.jsonl", self.asked)] if self.asked else []), *answered]


def _check_prompts(
    recipe: Recipe, asked: Sequence[generation.Asked], tokenizers: Mapping[str, PreTrainedTokenizerBase], limits: Mapping[str, int | None]
) -> None:
    """Refuse prompts that a chat template refuses, or that leave too little room for what is to be written."""
    problems = []
    most = recipe.config.generation.max_new_tokens
    for name, tokenizer in tokenizers.items():
        for i, prompt in enumerate(asked):
            try:
                tokens = len(generation.encode(tokenizer, prompt)[0])
            except CommandError as error:
                problems += recipe.problem(f"{name}: {error}", "prompts", i).problems
                continue
            limit = limits[name]
            message = f"{name}: the prompt has {tokens:,} tokens; with generation.max_new_tokens = {most:,} that is more than the model's {limit or 0:,} positions"
            problems += recipe.problem(message, "prompts", i).problems if limit is not None and tokens + most > limit else []
            if tokens == 0:
                problems += recipe.problem(f"{name}: its tokenizer makes no token of the prompt", "prompts", i).problems
    if problems:
        raise RecipeError(problems)


def _questions(
    inputs: Inputs, config: Evaluate, tokenizers: Mapping[str, PreTrainedTokenizerBase], limits: Mapping[str, int | None]
) -> tuple[list[Question], int, int]:
    """The questions that every model has room to answer, how many conversations are held out, and how many were left out as too long."""
    if config.answers is None:
        return [], 0, 0
    every, of = answer_metrics.questions(inputs, config.answers)
    most = config.generation.max_new_tokens

    def fits(question: Question) -> bool:
        return all(
            limits[name] is None or len(generation.encode(tokenizer, question.messages)[0]) + most <= (limits[name] or 0)
            for name, tokenizer in tokenizers.items()
        )

    kept = [question for question in every if fits(question)]
    if not kept:
        message = f"no held-out conversation leaves room for generation.max_new_tokens = {most:,} in the windows of all models"
        raise inputs.recipe.problem(message, "answers")
    return kept, of, len(every) - len(kept)


def _check_tasks(recipe: Recipe, tasks: lm_harness.Harness, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Refuse tasks that are not there, whose data are not, or that ask for a chat template which a model has not."""
    bare = [name for name, tokenizer in tokenizers.items() if tokenizer.chat_template is None]
    for i, task in enumerate(lm_harness.asked(recipe.config)):
        if task.apply_chat_template and bare:
            raise recipe.problem(f"apply_chat_template: models without a chat template: {', '.join(bare)}", "tasks", i)
    say("  opening benchmark tasks")
    tasks.open()


def _measure(job: Job, name: str, subject: Subject, tokenizer: PreTrainedTokenizerBase) -> None:
    """Everything about one model that is not there yet; it is loaded only if something is missing."""
    config = job.config
    sets = [key for key in job.held_out if not job.text(name, key).exists()]
    writing = [(file, prompts) for file, prompts in job.written(name) if generation.missing(file, len(prompts))]
    tasks = [nth for nth in range(len(config.tasks)) if not job.task(name, nth).exists()]
    about = job.folder / name / "model.json"
    if not (sets or writing or tasks) and about.exists():
        return
    net = _loaded(subject, config.precision)
    write_json(about, {"parameters": loading.count(net), "vocab_size": len(tokenizer)})
    for key in sets:
        found = bits_per_byte.bits(net, tokenizer, job.held_out[key], config.data.max_length, config.per_device_eval_batch_size)
        nats, tokens = found.of_documents
        write_json(job.text(name, key), {"nats": nats.tolist(), "tokens": tokens.tolist()})
        say(f"  {name}: {key}: {found.per_byte:.3f} bits/byte")
    writer = generation.Writer(net, tokenizer, config.generation, config.seed)
    for file, prompts in writing:
        for done in generation.fill(file, prompts, writer, config.per_device_eval_batch_size):
            say(f"  {name}: {file.stem} {done:,}/{len(prompts):,}")
    for nth in tasks:
        measured = job.tasks.run(nth, net, tokenizer, config.per_device_eval_batch_size)
        write_json(job.task(name, nth), measured)
        for task, line in measured["metrics"].items():
            say(f"  {name}: {task}: " + ", ".join(f"{metric} {found['value']:.3f}" for metric, found in line.items()))
    del net
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _loaded(subject: Subject, precision: str) -> PreTrainedModel:
    net = subject.load(precision)
    return net.to(torch.accelerator.current_accelerator()) if has_accelerator() else net


def _models(
    job: Job, found: Mapping[str, Subject], tokenizers: Mapping[str, PreTrainedTokenizerBase], given: tuple[str, Mapping[str, list[str]]]
) -> dict[str, Any]:
    """What was measured of each model, with intervals, and its differences to the baseline. `given`: its name, and each document's group."""
    (baseline, groups), seed = given, job.config.seed
    models: dict[str, Any] = {name: _about_model(job, name, subject) for name, subject in found.items()}
    for key, texts in job.held_out.items():
        drawn = Resampling(groups[key], seed)
        sizes, words = (np.array([measure(text) for text in texts]) for measure in (_bytes, _words))
        estimates = {}
        for name in found:
            kept = read_json(job.text(name, key))
            nats, tokens = np.array(kept["nats"]), np.array(kept["tokens"])
            estimates[name] = {
                "bpb": drawn.estimate(nats, sizes, 1 / math.log(2)),
                "fertility": drawn.estimate(tokens, words),
                "bytes_per_token": drawn.estimate(sizes, tokens),
            }
        for name, (values, differences) in compared(drawn, estimates, baseline).items():
            for measure, value in values.items():
                models[name].setdefault(measure, {})[key] = value
            for measure, value in differences.items():
                models[name]["difference"].setdefault(measure, {})[key] = value
    wanted = {
        "generations": output_metrics.expected(job.config),
        "answers": [Expected(job.config.language, job.config.script)] * len(job.questions),
    }
    for what, file in (("generations", "prompts.jsonl"), ("answers", "answers.jsonl")):
        if wanted[what]:
            _written(job, models, (what, file, wanted[what]), baseline)
    for nth in range(len(job.config.tasks)):
        measured = {name: read_json(job.task(name, nth)) for name in found}
        for name, own in measured.items():
            models[name].setdefault("tasks", {}).update(own["metrics"])
            if name != baseline:
                models[name]["difference"].setdefault("tasks", {}).update(lm_harness.differences(own, measured[baseline], seed))
    return {name: {key: value for key, value in line.items() if value != {}} for name, line in models.items()}


def _written(job: Job, models: dict[str, Any], which: tuple[str, str, Sequence[Expected]], baseline: str) -> None:
    """Put the measures of what the models wrote after the prompts, or as answers, into their lines."""
    what, file, wanted = which
    drawn = Resampling([str(i) for i in range(len(wanted))], job.config.seed)
    told = {name: output_metrics.tell(generation.read(job.folder / name / file), wanted, job.detector) for name in models}
    estimates = {name: output_metrics.estimates(lines, wanted, drawn) for name, lines in told.items()}
    if what == "answers":
        references = [question.reference for question in job.questions]
        for name, lines in told.items():
            estimates[name] = answer_metrics.estimates([line["output"] for line in lines], references, drawn) | estimates[name]
    for name, (values, differences) in compared(drawn, estimates, baseline).items():
        models[name][what] = values
        if name != baseline:
            models[name]["difference"][what] = differences
        if what == "generations":
            models[name]["samples"] = told[name]
        else:
            models[name]["answer_samples"] = told[name][:SAMPLES]


def _about_model(job: Job, name: str, subject: Subject) -> dict[str, Any]:
    adapter = {"adapter": subject.adapter} if subject.adapter else {}
    return {"path": subject.path, **adapter, **read_json(job.folder / name / "model.json"), "difference": {}}


def _asked(questions: Sequence[Question], of: int, too_long: int) -> dict[str, Any]:
    samples = [{"prompt": generation.title(question.messages), "reference": question.reference} for question in questions[:SAMPLES]]
    return {"conversations": len(questions), "held_out": of, "too_long": too_long, "samples": samples}


def _about(job: Job, found: Mapping[str, Subject]) -> dict[str, Any]:
    """What the tasks are; the same for every model."""
    first = next(iter(found))
    return {task: about for nth in range(len(job.config.tasks)) for task, about in read_json(job.task(first, nth))["tasks"].items()}


def _size(texts: Sequence[str]) -> dict[str, int]:
    return {"documents": len(texts), "bytes": sum(map(_bytes, texts)), "words": sum(map(_words, texts))}


def _bytes(text: str) -> int:
    return len(text.encode())


def _words(text: str) -> int:
    return len(text.split())
