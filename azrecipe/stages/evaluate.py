"""Stage evaluate: several models on the same text, prompts, conversations and tasks.

One process, on the accelerator where there is one. Each measurement is written when it is done, so a killed run goes on from there.
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
from azrecipe.distributed.attention_choice import AttentionUse, check_attention, check_model_attention
from azrecipe.distributed.backend import Backend, has_accelerator
from azrecipe.distributed.requirements import check_precision
from azrecipe.errors import CommandError, RecipeError
from azrecipe.evaluation import answer_metrics, bits_per_byte, generation, lm_harness, models, output_metrics
from azrecipe.evaluation.answer_metrics import HeldOutQuestion
from azrecipe.evaluation.models import EvaluatedModel
from azrecipe.evaluation.output_metrics import ExpectedOutput
from azrecipe.evaluation.task_code import check_task_code
from azrecipe.evaluation.token_losses import explain_evaluation_memory
from azrecipe.modeling import attention, loading
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import EvaluateConfig
from azrecipe.runs.run_attention import settle_attention
from azrecipe.runs.run_dir import locate_run, open_run
from azrecipe.utils import bootstrap
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.bootstrap import Resampling, compare_to_baseline
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SAMPLES = 3  # answers that result.json shows; all stand in the models' answers.jsonl
DEFINITIONS = {
    "bpb": "bits per byte: sum of -log2 p over all tokens of the held-out text / its UTF-8 bytes; comparable between tokenizers",
    "fertility": "tokens per white-space separated word, no special tokens",
    "bytes_per_token": "UTF-8 bytes per token, no special tokens",
    "interval": f"{bootstrap.CONFIDENCE_LEVEL} % of {bootstrap.NUM_RESAMPLES:,} resamples of documents (or their groups), prompts, conversations; null from a single one",
    "difference": "a model's value minus the baseline's, its interval from the same resamples of both",
    "generations": "of what is written after the prompts: language: share of outputs that lingua says are in the expected language; "
    "language_characters: of their characters; script: share of letters in the expected script; "
    f"repetition: share of {output_metrics.NGRAM_SIZE}-grams of words that have occurred before in the output; "
    "ended: share of outputs that the model ended itself; tokens, words, bytes: mean length of an output",
    "answers": "of answers to held-out conversations: chrf and chrf++ of all together (sacrebleu), rouge_l: mean F measure (rouge_score, Unicode words), "
    "all 0 to 100; and the measures of generations",
    "tasks": "as lm-evaluation-harness reports them, with its standard errors; differences from resamples of a task's questions",
}  # fmt: skip


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Measure every model; measurements of an interrupted run are kept."""
    if not backend.main:
        return {}
    run_dir = locate_run(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)
    checked = check(recipe, inputs)
    recipe = settle_attention(recipe, checked.attention, run_dir)
    config: EvaluateConfig = recipe.config

    with open_run(recipe, run_dir, inputs.fingerprints):
        job = EvaluationRun(config, run_dir.path / "models", checked.held_out, checked.prompts, checked.questions, checked.tasks)
        for name, model in checked.models.items():
            _measure_model(job, name, model, checked.tokenizers[name])
        baseline = config.baseline or next(iter(checked.models))
        run_dir.mark_complete(
            {
                "stage": "evaluate",
                "baseline": baseline,
                "attn_implementation": config.attn_implementation,
                "models": _summarize_models(job, checked.models, baseline=baseline, document_groups=inputs.document_groups),
                "validation": {key: _count_texts(texts) for key, texts in checked.held_out.items()},
                "prompts": [generation.get_prompt_title(prompt) for prompt in checked.prompts],
                "generation": asdict(config.generation),
                "expected": {
                    "language": config.language,
                    "script": config.script,
                    "decided_between": output_metrics.list_candidate_languages(config),
                },
                **({"answers": _describe_questions(checked)} if config.answers else {}),
                **({"harness": lm_harness.get_harness_version(), "tasks": _describe_tasks(job, checked.models)} if config.tasks else {}),
                "resamples": {"seed": config.seed, "count": bootstrap.NUM_RESAMPLES, "level": bootstrap.CONFIDENCE_LEVEL},
                "definitions": DEFINITIONS,
            }
        )
    return read_json(run_dir.path / "result.json") or {}


@dataclass(frozen=True)
class QuestionSelection:
    """The questions that every model has room to answer.

    Attributes:
        num_held_out: Conversations that are held out.
        num_too_long: Of these, those that leave no room for an answer.
    """

    questions: Sequence[HeldOutQuestion]
    num_held_out: int
    num_too_long: int


@dataclass(frozen=True)
class EvaluateInputs:
    """What a run measures, checked as far as possible without weights."""

    models: Mapping[str, EvaluatedModel]
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    held_out: Mapping[str, list[str]]
    prompts: Sequence[generation.PromptContent]
    selection: QuestionSelection
    tasks: lm_harness.Harness
    attention: AttentionUse

    @property
    def questions(self) -> Sequence[HeldOutQuestion]:
        return self.selection.questions


def check(recipe: Recipe, inputs: Inputs) -> EvaluateInputs:
    """Refuse all that can be refused before a model is loaded.

    `inputs` collects what a resume compares.
    """
    config: EvaluateConfig = recipe.config
    warning = check_precision("bf16_pure" if config.precision == "bfloat16" else "float32", use_liger_kernel=False)
    print_progress(warning, bool(warning))
    check_attention(config.attn_implementation, AttentionUse("evaluate", config.precision))
    output_metrics.check_evaluation_packages(config)
    lm_harness.check_harness_installed(config)
    check_task_code(recipe)
    evaluated, tokenizers = models.find_models(inputs, config.models)
    meta_models = {name: loading.load_meta_model(model.path, revision=model.revision) for name, model in evaluated.items()}
    default = "sdpa" if all(model.config._attn_implementation == "sdpa" for model in meta_models.values()) else "eager"
    use = AttentionUse("evaluate", config.precision, obstacles=attention.find_common_obstacles(meta_models.values()), default=default)
    check_model_attention(recipe, use)
    held_out = inputs.read_validation(config.data.validation)
    prompts = [generation.to_prompt_content(prompt) for prompt in config.prompts]
    limits = {name: getattr(model.config, "max_position_embeddings", None) for name, model in meta_models.items()}
    _check_prompts(recipe, prompts, tokenizers, limits)
    selection = _select_questions(inputs, config, tokenizers, limits)
    tasks = lm_harness.Harness(recipe)
    if config.tasks:
        _check_tasks(recipe, tasks, tokenizers)
        inputs.fingerprints |= tasks.hash_inputs()
    return EvaluateInputs(evaluated, tokenizers, held_out, prompts, selection, tasks, use)


@dataclass(frozen=True)
class EvaluationRun:
    """What the models are measured on, and where measurements are kept."""

    config: EvaluateConfig
    folder: Path
    held_out: Mapping[str, list[str]]
    prompts: Sequence[generation.PromptContent]
    questions: Sequence[HeldOutQuestion]
    tasks: lm_harness.Harness

    @cached_property
    def language_detector(self) -> output_metrics.LanguageDetector | None:
        """The language detector, opened for the first outputs that need it."""
        codes = output_metrics.list_candidate_languages(self.config)
        return output_metrics.LanguageDetector(codes) if codes else None

    def likelihood_file(self, name: str, dataset: str) -> Path:
        return self.folder / name / "text" / f"{dataset}.json"

    def task_file(self, name: str, task_index: int) -> Path:
        return self.folder / name / "tasks" / f"{task_index}.json"

    def list_output_files(self, name: str) -> list[tuple[Path, Sequence[generation.PromptContent]]]:
        """List a model's output files, each with its prompts."""
        answers = [(self.folder / name / "answers.jsonl", [question.messages for question in self.questions])] if self.questions else []
        return [*([(self.folder / name / "prompts.jsonl", self.prompts)] if self.prompts else []), *answers]


def _check_prompts(
    recipe: Recipe,
    prompts: Sequence[generation.PromptContent],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    limits: Mapping[str, int | None],
) -> None:
    """Refuse prompts that a chat template refuses or that are too long."""
    problems = []
    max_new_tokens = recipe.config.generation.max_new_tokens
    for name, tokenizer in tokenizers.items():
        for i, prompt in enumerate(prompts):
            try:
                tokens = len(generation.encode_prompt(tokenizer, prompt)[0])
            except CommandError as error:
                problems += recipe.error(f"{name}: {error}", "prompts", i).problems
                continue
            limit = limits[name]
            message = f"{name}: the prompt has {tokens:,} tokens; with generation.max_new_tokens = {max_new_tokens:,} that is more than the model's {limit or 0:,} positions"
            problems += recipe.error(message, "prompts", i).problems if limit is not None and tokens + max_new_tokens > limit else []
            if tokens == 0:
                problems += recipe.error(f"{name}: its tokenizer makes no token of the prompt", "prompts", i).problems
    if problems:
        raise RecipeError(problems)


def _select_questions(
    inputs: Inputs, config: EvaluateConfig, tokenizers: Mapping[str, PreTrainedTokenizerBase], limits: Mapping[str, int | None]
) -> QuestionSelection:
    """Select the questions that every model has room to answer."""
    if config.answers is None:
        return QuestionSelection([], 0, 0)
    every_question, num_held_out = answer_metrics.load_questions(inputs, config.answers)
    max_new_tokens = config.generation.max_new_tokens

    def fits(question: HeldOutQuestion) -> bool:
        return all(
            limits[name] is None or len(generation.encode_prompt(tokenizer, question.messages)[0]) + max_new_tokens <= (limits[name] or 0)
            for name, tokenizer in tokenizers.items()
        )

    fitting = [question for question in every_question if fits(question)]
    if not fitting:
        message = f"no held-out conversation leaves room for generation.max_new_tokens = {max_new_tokens:,} in the windows of all models"
        raise inputs.recipe.error(message, "answers")
    return QuestionSelection(fitting, num_held_out, len(every_question) - len(fitting))


def _check_tasks(recipe: Recipe, tasks: lm_harness.Harness, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Refuse tasks that cannot run with these models."""
    without_template = [name for name, tokenizer in tokenizers.items() if tokenizer.chat_template is None]
    for i, task in enumerate(lm_harness.requested_tasks(recipe.config)):
        if task.apply_chat_template and without_template:
            raise recipe.error(f"apply_chat_template: models without a chat template: {', '.join(without_template)}", "tasks", i)
    print_progress("  opening benchmark tasks")
    tasks.load_tasks()


def _measure_model(job: EvaluationRun, name: str, evaluated: EvaluatedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure what is missing of one model, which is loaded only then."""
    config = job.config
    missing_sets = [key for key in job.held_out if not job.likelihood_file(name, key).exists()]
    missing_outputs = [(file, prompts) for file, prompts in job.list_output_files(name) if generation.is_incomplete(file, len(prompts))]
    missing_tasks = [i for i in range(len(config.tasks)) if not job.task_file(name, i).exists()]
    model_file = job.folder / name / "model.json"
    if not (missing_sets or missing_outputs or missing_tasks) and model_file.exists():
        return
    model = _load_model(evaluated, config.precision, config.attn_implementation)
    write_json(model_file, {"parameters": loading.count_parameters(model), "vocab_size": len(tokenizer)})
    for key in missing_sets:
        with explain_evaluation_memory("per_device_eval_batch_size", config.per_device_eval_batch_size):
            score = bits_per_byte.score_texts(
                model, tokenizer, job.held_out[key], config.data.max_length, config.per_device_eval_batch_size
            )
        write_json(job.likelihood_file(name, key), {"nats": score.document_nats.tolist(), "tokens": score.document_tokens.tolist()})
        print_progress(f"  {name}: {key}: {score.bits_per_byte:.3f} bits/byte")
    generator = generation.TextGenerator(model, tokenizer, config.generation, config.seed)
    for file, prompts in missing_outputs:
        for num_done in generation.generate_missing(file, prompts, generator, config.per_device_eval_batch_size):
            print_progress(f"  {name}: {file.stem} {num_done:,}/{len(prompts):,}")
    for i in missing_tasks:
        result = job.tasks.run_task(i, model, tokenizer, config.per_device_eval_batch_size)
        write_json(job.task_file(name, i), result)
        for task, metrics in result["metrics"].items():
            print_progress(f"  {name}: {task}: " + ", ".join(f"{key} {metric['value']:.3f}" for key, metric in metrics.items()))
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load_model(evaluated: EvaluatedModel, precision: str, attn_implementation: str) -> PreTrainedModel:
    model = evaluated.load(precision, attn_implementation)
    return model.to(torch.accelerator.current_accelerator()) if has_accelerator() else model


def _summarize_models(
    job: EvaluationRun, evaluated: Mapping[str, EvaluatedModel], *, baseline: str, document_groups: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Summarize each model's measures, with intervals, and its differences to the baseline.

    Args:
        job: What was measured, and where the measurements are.
        evaluated: The models by name.
        baseline: Name of the model that the others are compared with.
        document_groups: For each validation set, the group of each document.

    Returns:
        The `models` of result.json, by name.
    """
    seed = job.config.seed
    models: dict[str, Any] = {name: _describe_model(job, name, model) for name, model in evaluated.items()}
    for key, texts in job.held_out.items():
        resampling = Resampling(document_groups[key], seed)
        sizes, words = (np.array([count(text) for text in texts]) for count in (_count_bytes, _count_words))
        estimates = {}
        for name in evaluated:
            likelihood = read_json(job.likelihood_file(name, key))
            nats, tokens = np.array(likelihood["nats"]), np.array(likelihood["tokens"])
            estimates[name] = {
                "bpb": resampling.estimate_ratio(nats, sizes, 1 / math.log(2)),
                "fertility": resampling.estimate_ratio(tokens, words),
                "bytes_per_token": resampling.estimate_ratio(sizes, tokens),
            }
        for name, (values, differences) in compare_to_baseline(resampling, estimates, baseline).items():
            for measure, value in values.items():
                models[name].setdefault(measure, {})[key] = value
            for measure, value in differences.items():
                models[name]["difference"].setdefault(measure, {})[key] = value
    expected_outputs = output_metrics.list_expected_outputs(job.config)
    if expected_outputs:
        _add_output_metrics(job, models, baseline, kind="generations", expected=expected_outputs)
    if job.questions:
        expected_answers = [ExpectedOutput(job.config.language, job.config.script)] * len(job.questions)
        _add_output_metrics(job, models, baseline, kind="answers", expected=expected_answers)
    for i in range(len(job.config.tasks)):
        results = {name: read_json(job.task_file(name, i)) for name in evaluated}
        for name, result in results.items():
            models[name].setdefault("tasks", {}).update(result["metrics"])
            if name != baseline:
                models[name]["difference"].setdefault("tasks", {}).update(lm_harness.compare_results(result, results[baseline], seed))
    return {name: {key: value for key, value in line.items() if value != {}} for name, line in models.items()}


def _add_output_metrics(
    job: EvaluationRun, models: dict[str, Any], baseline: str, *, kind: str, expected: Sequence[ExpectedOutput]
) -> None:
    """Add the measures of the models' outputs to their entries.

    Args:
        job: What was measured, and where the measurements are.
        models: The entries by model, changed in place.
        baseline: Name of the model that the others are compared with.
        kind: "generations" (after the prompts) or "answers" (to the held-out questions).
        expected: Language and script of each output.
    """
    resampling = Resampling([str(i) for i in range(len(expected))], job.config.seed)
    file_name = "prompts.jsonl" if kind == "generations" else "answers.jsonl"
    outputs = {
        name: output_metrics.annotate_language(generation.read_generations(job.folder / name / file_name), expected, job.language_detector)
        for name in models
    }
    estimates = {name: output_metrics.estimate_output_metrics(lines, expected, resampling) for name, lines in outputs.items()}
    if kind == "answers":
        references = [question.reference for question in job.questions]
        for name, lines in outputs.items():
            answers = [line["output"] for line in lines]
            estimates[name] = answer_metrics.estimate_answer_metrics(answers, references, resampling) | estimates[name]
    for name, (values, differences) in compare_to_baseline(resampling, estimates, baseline).items():
        models[name][kind] = values
        if name != baseline:
            models[name]["difference"][kind] = differences
        if kind == "generations":
            models[name]["samples"] = outputs[name]
        else:
            models[name]["answer_samples"] = outputs[name][:NUM_SAMPLES]


def _describe_model(job: EvaluationRun, name: str, evaluated: EvaluatedModel) -> dict[str, Any]:
    adapter = {"adapter": evaluated.adapter} if evaluated.adapter else {}
    return {"path": evaluated.path, **adapter, **read_json(job.folder / name / "model.json"), "difference": {}}


def _describe_questions(checked: EvaluateInputs) -> dict[str, Any]:
    selection = checked.selection
    samples = [
        {"prompt": generation.get_prompt_title(question.messages), "reference": question.reference}
        for question in selection.questions[:NUM_SAMPLES]
    ]
    return {
        "conversations": len(selection.questions),
        "held_out": selection.num_held_out,
        "too_long": selection.num_too_long,
        "samples": samples,
    }


def _describe_tasks(job: EvaluationRun, evaluated: Mapping[str, EvaluatedModel]) -> dict[str, Any]:
    """Describe the tasks; the same for every model."""
    first = next(iter(evaluated))
    results = [read_json(job.task_file(first, i)) for i in range(len(job.config.tasks))]
    return {task: description for result in results for task, description in result["tasks"].items()}


def _count_texts(texts: Sequence[str]) -> dict[str, int]:
    return {"documents": len(texts), "bytes": sum(map(_count_bytes, texts)), "words": sum(map(_count_words, texts))}


def _count_bytes(text: str) -> int:
    return len(text.encode())


def _count_words(text: str) -> int:
    return len(text.split())
