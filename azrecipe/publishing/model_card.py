"""Render the model card from the records of a model's runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.publishing import merge_card
from azrecipe.publishing.licenses import LicenseTerms
from azrecipe.publishing.merge_card import render_table
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.runs.lineage import Lineage, ModelEvaluation
from azrecipe.runs.reader import RunRecord
from azrecipe.utils.paths import is_local_data, is_s3

UNKNOWN = "unknown"
# Keys of `training` that do not change the weights.
_HIDDEN_KEYS = ("report_to", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "profile", "per_device_eval_batch_size")
_TITLES = {"bpb": "Bits per byte", "fertility": "Fertility", "bytes_per_token": "Bytes per token"}
_METRICS = {"bpb": "bits_per_byte", "held_out_loss": "loss"}
_FLORES = re.compile(r"([a-z]{3})_[A-Z][a-z]{3}")  # FineWeb-2's names of its subsets
_WIKIPEDIA = re.compile(r"\d{8}\.([a-z]{2,3})")  # of wikimedia/wikipedia


@dataclass(frozen=True)
class CardSettings:
    """What the command line says about the model."""

    repo_id: str
    license: str | None
    data_license: str | None
    languages: Sequence[str]
    has_chat_template: bool = False


def list_languages(lineage: Lineage) -> list[str]:
    """List the ISO 639 codes in the names of the data."""
    codes: dict[str, None] = {}
    for source in (s for step in lineage.runs for s in step.recipe.get("data", {}).get("datasets", [])):
        match = _FLORES.fullmatch(str(source.get("name"))) or _WIKIPEDIA.fullmatch(str(source.get("name")))
        if match:
            codes[match.group(1)] = None
    return list(codes)


def render_card(lineage: Lineage, evaluations: Sequence[ModelEvaluation], settings: CardSettings, terms: LicenseTerms | None) -> str:
    """Render README.md: the hub's metadata, then the card.

    Args:
        lineage: The runs that trained the model.
        evaluations: Its evaluations.
        settings: What the command line says about it.
        terms: The terms of its base's licence, if that is a Llama's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = settings.repo_id.rsplit("/", 1)[-1]
    results = list(_iter_model_index(lineage, evaluations))
    stages = {step.stage for step in lineage.runs}
    data = ModelCardData(
        language=list(settings.languages) or None,
        license=settings.license,
        license_link=terms.url if terms else None,
        base_model=lineage.hub_base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["azrecipe", *(["continued-pretraining"] if "pretrain" in stages else []), *_list_tuning_tags(lineage)],
        datasets=sorted({source["path"] for step in lineage.runs for source in _list_sources(step) if _is_on_hub(source)}) or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    body = _escape_html("\n\n".join(part for part in _iter_sections(lineage, evaluations, settings, terms) if part))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{body}\n"))


def _escape_html(text: str) -> str:
    """Escape what Markdown would take for HTML; recipes and models may hold it.

    A special token such as <|eot_id|> is none.
    """
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def _iter_sections(
    lineage: Lineage, evaluations: Sequence[ModelEvaluation], settings: CardSettings, terms: LicenseTerms | None
) -> Iterator[str]:
    if terms is not None and terms.built_with:
        yield f"**{terms.built_with}**"
    yield _render_intro(lineage)
    yield _render_usage(settings)
    if lineage.runs:
        yield "## Training steps\n\n" + "\n\n".join(_render_step(step) for step in lineage.runs)
        yield _render_data(lineage, settings)
        yield "## Hyperparameters\n\n" + "\n\n".join(_render_hyperparameters(step) for step in lineage.runs if "training" in step.recipe)
        yield "## Measured\n\n" + (_render_evaluation(lineage, evaluations) or "Nothing was measured.")
        yield _render_environment(lineage)
    yield _render_limits(lineage, evaluations)
    yield _render_license(settings, terms)


def _render_intro(lineage: Lineage) -> str:
    if not lineage.runs:
        return "Nothing is recorded about how this model was made."
    last = lineage.runs[-1]
    description = str(last.recipe.get("description") or "")
    if lineage.missing_run:
        origin = f"The steps before `{lineage.runs[0].name}` are not recorded: its model came from the run `{lineage.missing_run}`, which is no longer there."
    elif lineage.hub_base:
        origin = f"It was trained from [{lineage.hub_base}](https://huggingface.co/{lineage.hub_base})."
    elif lineage.base:
        origin = f"It was trained from a model in a local folder, `{Path(lineage.base).name}`."
    else:
        origin = "It was trained from scratch, without a base model."
    size = last.result.get("parameters")
    return " ".join(part for part in (description, origin, f"It has {size:,} parameters." if size else "") if part)


def _render_usage(settings: CardSettings) -> str:
    prompt = (
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if settings.has_chat_template
        else 'ids = tokenizer("…", return_tensors="pt")'
    )
    note = (
        "It answers messages, and stops at the end of its turn."
        if settings.has_chat_template
        else "It continues text. It was not trained to answer."
    )
    return (
        f"## How to use\n\n{note}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{settings.repo_id}")\nmodel = AutoModelForCausalLM.from_pretrained("{settings.repo_id}")\n'
        f'{prompt}\noutput = model.generate(**ids, max_new_tokens=128)\nprint(tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))\n```'
    )


def _render_step(step: RunRecord) -> str:
    """Render a step: its phases, or its conversations and adapter."""
    title = f"**{step.name}** (`{step.stage}`). {step.recipe.get('description') or ''}".strip()
    result = step.result
    if step.stage == "merge":
        return f"{title}\n\n{merge_card.render_merge(step)}"
    if step.stage == "pretrain":
        trainable = {phase["name"]: ", ".join(phase["trainable_parameters"]) for phase in step.recipe["phases"]}
        rows = [
            [name, trainable.get(name, ""), f"{phase.get('trainable_parameters', 0):,}", f"{phase['learning_rate']:g}", f"{phase['steps']:,}",
             f"{phase['tokens']:,}", f"{phase['bytes']:,}"]
            for name, phase in result["phases"].items()
        ]  # fmt: skip
        swap: Mapping[str, Any] = result.get("vocabulary") or {}
        vocabulary = ""
        if swap.get("old_size") != swap.get("new_size"):
            method = step.recipe["tokenizer"]["new_embeddings"]
            vocabulary = f"\n\nThe vocabulary was changed from {swap['old_size']:,} to {swap['new_size']:,} tokens; new embeddings were initialized by `{method}`."
        columns = ["phase", "trained", "parameters trained", "learning rate", "steps", "tokens", "bytes of text"]
        return f"{title}\n\n{render_table(columns, rows)}{vocabulary}"
    data, lora, training = result["data"], step.recipe.get("lora"), result["training"]
    adapter = step.recipe.get("adapter", "lora")
    quantized = " on a base in 4 bits" if adapter == "qlora" else ""
    kind = (
        f"LoRA (r {lora['r']}, alpha {lora['lora_alpha']}){quantized}, merged into the weights"
        if lora and adapter != "none"
        else "All weights were trained"
    )
    if _uses_preferences(step):
        kind = f"Direct preference optimization (beta {step.recipe['dpo']['beta']:g}, {step.recipe['dpo']['loss_type']}). {kind}"
    counts = {"train": "preferences to train on" if _uses_preferences(step) else "conversations to train on", "trained_tokens": "trained tokens", "held_out": "held out", "duplicates": "duplicates left out",
              "dropped": "left out without a trained token", "truncated": "cut to the longest length"}  # fmt: skip
    amounts = ", ".join(f"{data[key]:,} {meaning}" for key, meaning in counts.items() if key in data)
    return f"{title}\n\n{kind}. {amounts}. {training['epochs']:g} epochs, {training['steps']:,} steps."


def _uses_preferences(step: RunRecord) -> bool:
    return step.stage == "sft" and step.recipe.get("method") == "dpo"


def _list_tuning_tags(lineage: Lineage) -> list[str]:
    """List the hub's tags for how a model was tuned."""
    steps = [step for step in lineage.runs if step.stage == "sft"]
    tags = [tag for step in steps for tag in ("dpo" if _uses_preferences(step) else "sft", step.recipe.get("adapter", "lora"))]
    return list(dict.fromkeys(tag for tag in tags if tag != "none"))


def _list_sources(step: RunRecord) -> list[Mapping[str, Any]]:
    sources: list[Mapping[str, Any]] = step.recipe.get("data", {}).get("datasets", [])
    return sources


def _is_on_hub(source: Mapping[str, Any]) -> bool:
    return not is_local_data(source["path"]) and not is_s3(source["path"])


def _format_source(source: Mapping[str, Any]) -> str:
    """Format a source's name, without private parts of local paths."""
    path = str(source["path"])
    if _is_on_hub(source):
        parts = [f"[{path}](https://huggingface.co/datasets/{path})", source.get("name"), source.get("split")]
        return " ".join(str(part) for part in parts if part)
    is_relative = not is_s3(path) and not path.startswith(("/", "~", "../"))
    return f"`{path.removeprefix('./') if is_relative else '/'.join(Path(path).parts[-2 if '*' in Path(path).name else -1 :])}` (files)"


def _render_data(lineage: Lineage, settings: CardSettings) -> str:
    rows = []
    for step in lineage.runs:
        is_pretrain = step.stage == "pretrain"
        counts = step.result.get("data") if is_pretrain else step.result.get("training", {}).get("sources")
        for i, source in enumerate(_list_sources(step)):
            count = counts[i] if isinstance(counts, list) and i < len(counts) else {}
            share = f"{count['share']:.1%}" if "share" in count else "–"
            epochs = count.get("epochs", step.result["training"]["epochs"] if step.stage == "sft" else None)
            sizes = [f"{count[key]:,}" if key in count else "–" for key in ("documents" if is_pretrain else "rows", "bytes")]
            license_text = settings.data_license or UNKNOWN
            rows.append([step.name, _format_source(source), share, "–" if epochs is None else f"{epochs:g}", *sizes, license_text])
    notes = "A share is of the bytes of text read in a step; epochs count how often its documents were read." + (
        "" if settings.data_license else " The licences of the data are not recorded."
    )
    return f"## Data\n\n{render_table(['step', 'source', 'share', 'epochs', 'documents', 'bytes', 'licence'], rows)}\n\n{notes}"


def _render_hyperparameters(step: RunRecord) -> str:
    recipe = step.recipe
    training = {key: value for key, value in recipe["training"].items() if key not in _HIDDEN_KEYS and not merge_card.is_local_path(value)}
    parts: dict[str, Any] = {"seed": recipe.get("seed"), "max_length": recipe["data"].get("max_length")}
    if "phases" in recipe:
        parts["phases"] = recipe["phases"]
    keys = (
        "method",
        "adapter",
        "chat_template",
        *(["lora"] if recipe.get("adapter") != "none" else []),
        *(["dpo"] if _uses_preferences(step) else []),
    )
    for key in keys:
        if key in recipe and not merge_card.is_local_path(recipe[key]):
            parts[key] = recipe[key]
    return f"{step.name}:\n\n```yaml\n{to_yaml({**parts, 'training': training})}```"


def _render_evaluation(lineage: Lineage, evaluations: Sequence[ModelEvaluation]) -> str:
    """Render the evaluations, and what the last step measured.

    Each number has its definition.
    """
    paragraphs = []
    for evaluation in evaluations:
        result = evaluation.run.result
        sizes = "; ".join(
            f"{name}: {size.get('documents', 0):,} documents, {size.get('bytes', 0):,} bytes"
            for name, size in result.get("validation", {}).items()
        )
        paragraphs.append(f"All models on the same held-out text ({sizes}). `{evaluation.model_name}` is this model.")
        for key in _list_measures(result["models"][evaluation.model_name]):
            columns = list(result["models"][evaluation.model_name][key])
            rows = [
                [name, *(_format_measure(model.get(key, {}).get(column)) for column in columns)] for name, model in result["models"].items()
            ]
            meaning = result.get("definitions", {}).get(key)
            paragraphs.append(f"{_TITLES.get(key, key)}{f' ({meaning})' if meaning else ''}:\n\n{render_table(['model', *columns], rows)}")
    last = lineage.runs[-1]
    if last.stage == "sft" and (loss := last.result.get("held_out_loss")):
        meaning = last.result["definitions"]["held_out_loss"]
        paragraphs.append(
            f"Loss on {last.result['data']['held_out']:,} held-out conversations ({meaning}): {_format_measure(loss['before'])} before, {_format_measure(loss['after'])} after instruction tuning."
        )
    elif _uses_preferences(last) and last.result["held_out_accuracy"]["after"] is not None:
        share, meaning = last.result["held_out_accuracy"], last.result["definitions"]["held_out_accuracy"]
        pairs = f"{last.result['data']['held_out']:,} held-out preferences"
        paragraphs.append(f"On {pairs} ({meaning}): {_format_measure(share['before'])} before, {_format_measure(share['after'])} after.")
    elif last.stage == "pretrain" and not evaluations:
        bpb = last.result["bpb"]
        columns = list(next(iter(bpb.values()), {}))
        rows = [[point, *(_format_measure(values.get(column)) for column in columns)] for point, values in bpb.items()]
        paragraphs.append(f"Bits per byte ({last.result['definitions']['bpb']}):\n\n{render_table(['after', *columns], rows)}")
    return "\n\n".join(paragraphs)


def _list_measures(model: Mapping[str, Any]) -> list[str]:
    """List a model's measures: numbers by set or task."""
    return [
        key
        for key, value in model.items()
        if isinstance(value, Mapping) and value and all(_get_value(measure) is not None for measure in value.values())
    ]


def _get_value(measure: Any) -> float | None:
    """Return the number of a measure, which may have an interval."""
    value = measure.get("value") if isinstance(measure, Mapping) else measure
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _format_measure(measure: Any) -> str:
    value = _get_value(measure)
    if value is None:
        return "–"
    interval = measure.get("interval") if isinstance(measure, Mapping) else None
    return f"{value:.3f}" + (f" [{interval[0]:.3f}–{interval[1]:.3f}]" if interval else "")


def _iter_model_index(lineage: Lineage, evaluations: Sequence[ModelEvaluation]) -> Iterator[Any]:
    """Yield this model's numbers for the hub's model-index."""
    from huggingface_hub import EvalResult

    for evaluation in evaluations:
        model = evaluation.run.result["models"][evaluation.model_name]
        sources = evaluation.run.recipe.get("data", {}).get("validation", {})
        for key in _list_measures(model):
            for name, measure in model[key].items():
                source = sources.get(name) or {"path": "./"}
                dataset = {"dataset_type": source["path"], "dataset_config": source.get("name"), "dataset_split": source.get("split")}
                yield EvalResult(
                    task_type="text-generation", dataset_name=name, metric_type=_METRICS.get(key, key), metric_value=_get_value(measure),
                    metric_name=_TITLES.get(key, key), **(dataset if _is_on_hub(source) else {"dataset_type": f"{evaluation.run.name}/{name}"}),
                )  # fmt: skip
    last = lineage.runs[-1] if lineage.runs else None
    if last is not None and last.stage == "sft" and (last.result.get("held_out_loss") or {}).get("after") is not None:
        yield EvalResult(
            task_type="text-generation", dataset_type="held-out-conversations", dataset_name="held-out conversations",
            metric_type=_METRICS["held_out_loss"], metric_value=last.result["held_out_loss"]["after"], metric_name="Loss a trained token",
        )  # fmt: skip


def _render_environment(lineage: Lineage) -> str:
    names_by_environment: dict[str, list[str]] = {}
    for step in lineage.runs:
        machine = step.environment
        gpus = ", ".join(dict.fromkeys(machine.get("gpus") or [])) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
        environment = f"azrecipe {machine.get('azrecipe')}, Python {machine.get('python')}, {versions}; {machine.get('world_size')} processes, {gpus}, {machine.get('processor')}"
        names_by_environment.setdefault(environment, []).append(step.name)
    return "## Environment\n\n" + "\n".join(f"- {', '.join(names)}: {environment}" for environment, names in names_by_environment.items())


def _render_limits(lineage: Lineage, evaluations: Sequence[ModelEvaluation]) -> str:
    limits = [
        "Only what the tables above show was measured. Facts, reasoning, safety, bias and human preference were not, unless a table shows them."
    ]
    if lineage.runs and not evaluations:
        limits.append("The model has not been compared with its base in one evaluation.")
    for evaluation in evaluations:
        small = [name for name, size in evaluation.run.result.get("validation", {}).items() if size.get("documents", 0) < 100]
        if small:
            limits.append(f"The held-out text is small ({', '.join(small)}: fewer than 100 documents), so small differences mean little.")
    for step in lineage.runs:
        if step.stage == "sft":
            rows = "preferences" if _uses_preferences(step) else "conversations"
            limits.append(
                f"It was trained to answer on {step.result['data']['train']:,} {rows}. Whether its answers are true was not checked."
            )
    if lineage.missing_run:
        limits.append(f"The record is not complete: the run `{lineage.missing_run}` is missing.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _render_license(settings: CardSettings, terms: LicenseTerms | None) -> str:
    if terms is not None:
        built_with = f" {terms.built_with}." if terms.built_with else ""
        return f"## Licence\n\n[{terms.license}]({terms.url}), as its base.{built_with} {terms.notice}"
    return f"## Licence\n\n{settings.license or 'Not stated.'}"
