"""The model card: what a run directory knows, written for someone who finds the model on the hub. Nothing in it is made up here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.publishing.licenses import Terms
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.runs import lineage
from azrecipe.runs.lineage import Lineage, Measured, Step
from azrecipe.utils.paths import is_local_data, is_s3

UNKNOWN = "unknown"
# Keys of `training` that say how often something is looked at or kept, and nothing about the weights.
_NOT_SHOWN = ("report_to", "logging_steps", "save_steps", "save_total_limit", "eval_steps", "profile", "per_device_eval_batch_size")
_TITLES = {"bpb": "Bits per byte", "fertility": "Fertility", "bytes_per_token": "Bytes per token"}
_METRICS = {"bpb": "bits_per_byte", "held_out_loss": "loss"}
_FLORES = re.compile(r"([a-z]{3})_[A-Z][a-z]{3}")  # a corpus named as FineWeb-2 names them
_WIKIPEDIA = re.compile(r"\d{8}\.([a-z]{2,3})")


@dataclass(frozen=True)
class About:
    """What a user says about the model, beside what the run knows."""

    repo_id: str
    license: str | None
    data_license: str | None
    languages: Sequence[str]
    chats: bool = False  # whether the model has a chat template


def languages(line: Lineage) -> list[str]:
    """ISO 639 codes that the names of the corpora tell, most of the text first; empty where they tell none."""
    found: dict[str, None] = {}
    for source in (s for step in line.steps for s in step.recipe.get("data", {}).get("datasets", [])):
        match = _FLORES.fullmatch(str(source.get("name"))) or _WIKIPEDIA.fullmatch(str(source.get("name")))
        if match:
            found[match.group(1)] = None
    return list(found)


def text(line: Lineage, evaluations: Sequence[Measured], about: About, terms: Terms | None) -> str:
    """The whole README.md: metadata for the hub, then the card."""
    from huggingface_hub import ModelCard, ModelCardData

    name = about.repo_id.rsplit("/", 1)[-1]
    results = list(_results(line, evaluations))
    stages = {step.stage for step in line.steps}
    data = ModelCardData(
        language=list(about.languages) or None,
        license=about.license,
        license_link=terms.url if terms else None,
        base_model=line.hub_base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["azrecipe", *(["continued-pretraining"] if "pretrain" in stages else []), *_tuned(line)],
        datasets=sorted({source["path"] for step in line.steps for source in _sources(step) if _on_hub(source)}) or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    body = "\n\n".join(part for part in _parts(line, evaluations, about, terms) if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{body}\n"))


def _parts(line: Lineage, evaluations: Sequence[Measured], about: About, terms: Terms | None) -> Iterator[str]:
    if terms is not None and terms.built_with:
        yield f"**{terms.built_with}**"
    yield _intro(line)
    yield _use(about)
    if line.steps:
        yield "## How it was made\n\n" + "\n\n".join(_made(step) for step in line.steps)
        yield _data(line, about)
        yield "## Hyperparameters\n\n" + "\n\n".join(map(_hyperparameters, line.steps))
        yield "## Measured\n\n" + (_measured(line, evaluations) or "Nothing was measured.")
        yield _environment(line)
    yield _limits(line, evaluations)
    yield _licence(about, terms)


def _intro(line: Lineage) -> str:
    if not line.steps:
        return "Nothing is recorded about how this model was made."
    last = line.steps[-1]
    described = str(last.recipe.get("description") or "")
    if line.lost:
        began = f"What came before `{line.steps[0].name}` is not recorded: the run `{line.lost}` that it took its model from is no longer there."
    elif line.hub_base:
        began = f"It began as [{line.hub_base}](https://huggingface.co/{line.hub_base})."
    elif line.base:
        began = f"It began as a model in a local folder, `{Path(line.base).name}`."
    else:
        began = "It was trained from nothing: no base model."
    size = last.result.get("parameters")
    return " ".join(part for part in (described, began, f"It has {size:,} parameters." if size else "") if part)


def _use(about: About) -> str:
    prompt = (
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if about.chats
        else 'ids = tokenizer("…", return_tensors="pt")'
    )
    note = (
        "It answers messages and ends by itself at the end of its turn."
        if about.chats
        else "It continues text; it has not been taught to answer."
    )
    return (
        f"## How to use\n\n{note}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{about.repo_id}")\nmodel = AutoModelForCausalLM.from_pretrained("{about.repo_id}")\n'
        f'{prompt}\noutput = model.generate(**ids, max_new_tokens=128)\nprint(tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))\n```'
    )


def _made(step: Step) -> str:
    """One step: its phases, or its conversations and adapter."""
    head = f"**{step.name}** (`{step.stage}`). {step.recipe.get('description') or ''}".strip()
    result = step.result
    if step.stage == "pretrain":
        trainable = {phase["name"]: ", ".join(phase["trainable_parameters"]) for phase in step.recipe["phases"]}
        rows = [
            [name, trainable.get(name, ""), f"{done.get('trainable_parameters', 0):,}", f"{done['learning_rate']:g}", f"{done['steps']:,}",
             f"{done['tokens']:,}", f"{done['bytes']:,}"]
            for name, done in result["phases"].items()
        ]  # fmt: skip
        changed: Mapping[str, Any] = result.get("vocabulary") or {}
        vocabulary = ""
        if changed.get("old_size") != changed.get("new_size"):
            method = step.recipe["tokenizer"]["new_embeddings"]
            vocabulary = f"\n\nThe vocabulary was changed from {changed['old_size']:,} to {changed['new_size']:,} tokens; new embeddings began by `{method}`."
        heads = ["phase", "trained", "parameters trained", "learning rate", "steps", "tokens", "bytes of text"]
        return f"{head}\n\n{_table(heads, rows)}{vocabulary}"
    data, lora, happened = result["data"], step.recipe.get("lora"), result["training"]
    adapter = step.recipe.get("adapter", "lora")
    quantized = " on a base in 4 bits" if adapter == "qlora" else ""
    kind = (
        f"LoRA (r {lora['r']}, alpha {lora['lora_alpha']}){quantized}, merged into the weights"
        if lora and adapter != "none"
        else "All weights were trained"
    )
    if _preferences(step):
        kind = f"Direct preference optimization (beta {step.recipe['dpo']['beta']:g}, {step.recipe['dpo']['loss_type']}). {kind}"
    counts = {"train": "preferences learned from" if _preferences(step) else "conversations learned from", "trained_tokens": "trained tokens", "held_out": "held out", "duplicates": "duplicates left out",
              "dropped": "left out for want of a trained token", "truncated": "cut to the longest length"}  # fmt: skip
    told = ", ".join(f"{data[key]:,} {meaning}" for key, meaning in counts.items() if key in data)
    return f"{head}\n\n{kind}. {told}. {happened['epochs']:g} epochs, {happened['steps']:,} steps."


def _preferences(step: Step) -> bool:
    return step.stage == "sft" and step.recipe.get("method") == "dpo"


def _tuned(line: Lineage) -> list[str]:
    """The hub's tags for the ways in which a model was tuned."""
    steps = [step for step in line.steps if step.stage == "sft"]
    tags = [tag for step in steps for tag in ("dpo" if _preferences(step) else "sft", step.recipe.get("adapter", "lora"))]
    return list(dict.fromkeys(tag for tag in tags if tag != "none"))


def _sources(step: Step) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = step.recipe.get("data", {}).get("datasets", [])
    return found


def _on_hub(source: Mapping[str, Any]) -> bool:
    return not is_local_data(source["path"]) and not is_s3(source["path"])


def _shown(source: Mapping[str, Any]) -> str:
    """A source's name; of files here, no more of their path than what stands inside the working folder."""
    path = str(source["path"])
    if _on_hub(source):
        parts = [f"[{path}](https://huggingface.co/datasets/{path})", source.get("name"), source.get("split")]
        return " ".join(str(part) for part in parts if part)
    inside = not is_s3(path) and not path.startswith(("/", "~", "../"))
    return f"`{path.removeprefix('./') if inside else '/'.join(Path(path).parts[-2 if '*' in Path(path).name else -1 :])}` (files)"


def _data(line: Lineage, about: About) -> str:
    rows = []
    for step in line.steps:
        numbers = step.result.get("data") if step.stage == "pretrain" else step.result.get("training", {}).get("sources")
        for i, source in enumerate(_sources(step)):
            own = numbers[i] if isinstance(numbers, list) and i < len(numbers) else {}
            share = f"{own['share']:.1%}" if "share" in own else "–"
            epochs = f"{own['epochs']:g}" if "epochs" in own else f"{step.result['training']['epochs']:g}" if step.stage == "sft" else "–"
            sizes = [f"{own[key]:,}" if key in own else "–" for key in ("documents" if step.stage == "pretrain" else "rows", "bytes")]
            rows.append([step.name, _shown(source), share, epochs, *sizes, about.data_license or UNKNOWN])
    notes = "A share is of the bytes of text read in a step; epochs count how often its documents were gone through." + (
        "" if about.data_license else " The licences of the data are not recorded."
    )
    return f"## Data\n\n{_table(['step', 'source', 'share', 'epochs', 'documents', 'bytes', 'licence'], rows)}\n\n{notes}"


def _hyperparameters(step: Step) -> str:
    recipe = step.recipe
    shown = {key: value for key, value in recipe["training"].items() if key not in _NOT_SHOWN and not _path(value)}
    whole: dict[str, Any] = {"seed": recipe.get("seed"), "max_length": recipe["data"].get("max_length")}
    if "phases" in recipe:
        whole["phases"] = recipe["phases"]
    methods = (
        "method",
        "adapter",
        "chat_template",
        *(["lora"] if recipe.get("adapter") != "none" else []),
        *(["dpo"] if _preferences(step) else []),
    )
    for key in methods:
        if key in recipe and not _path(recipe[key]):
            whole[key] = recipe[key]
    return f"{step.name}:\n\n```yaml\n{to_yaml({**whole, 'training': shown})}```"


def _path(value: Any) -> bool:
    """Whether a value is, or holds, the path of something on the machine that trained."""
    if isinstance(value, Mapping):
        return any(map(_path, value.values()))
    return isinstance(value, str) and value.startswith(("/", "./", "../", "~"))


def _measured(line: Lineage, evaluations: Sequence[Measured]) -> str:
    """Each evaluation's table, then what the last step measured by itself; every number with how it was computed."""
    found = []
    for evaluation in evaluations:
        result = evaluation.step.result
        sizes = "; ".join(
            f"{name}: {size.get('documents', 0):,} documents, {size.get('bytes', 0):,} bytes"
            for name, size in result.get("validation", {}).items()
        )
        found.append(f"All models on the same held-out text ({sizes}). `{evaluation.name}` is this model.")
        for key in _measures(result["models"][evaluation.name]):
            sets = list(result["models"][evaluation.name][key])
            rows = [[name, *(_number(model.get(key, {}).get(one)) for one in sets)] for name, model in result["models"].items()]
            meaning = result.get("definitions", {}).get(key)
            found.append(f"{_TITLES.get(key, key)}{f' ({meaning})' if meaning else ''}:\n\n{_table(['model', *sets], rows)}")
    last = line.steps[-1]
    if last.stage == "sft" and (loss := last.result.get("held_out_loss")):
        meaning = last.result["definitions"]["held_out_loss"]
        found.append(
            f"Loss on {last.result['data']['held_out']:,} held-out conversations ({meaning}): {_number(loss['before'])} before, {_number(loss['after'])} after instruction tuning."
        )
    elif _preferences(last) and last.result["held_out_accuracy"]["after"] is not None:
        share, meaning = last.result["held_out_accuracy"], last.result["definitions"]["held_out_accuracy"]
        pairs = f"{last.result['data']['held_out']:,} held-out preferences"
        found.append(f"On {pairs} ({meaning}): {_number(share['before'])} before, {_number(share['after'])} after.")
    elif last.stage == "pretrain" and not evaluations:
        bpb = last.result["bpb"]
        sets = list(next(iter(bpb.values()), {}))
        rows = [[point, *(_number(values.get(one)) for one in sets)] for point, values in bpb.items()]
        found.append(f"Bits per byte ({last.result['definitions']['bpb']}):\n\n{_table(['after', *sets], rows)}")
    return "\n\n".join(found)


def _measures(model: Mapping[str, Any]) -> list[str]:
    """The measures of an evaluated model: a number for each of several sets or tasks."""
    return [
        key
        for key, value in model.items()
        if isinstance(value, Mapping) and value and all(_value(one) is not None for one in value.values())
    ]


def _value(measure: Any) -> float | None:
    """A measure's number, with or without its interval."""
    value = measure.get("value") if isinstance(measure, Mapping) else measure
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number(measure: Any) -> str:
    value = _value(measure)
    if value is None:
        return "–"
    interval = measure.get("interval") if isinstance(measure, Mapping) else None
    return f"{value:.3f}" + (f" [{interval[0]:.3f}–{interval[1]:.3f}]" if interval else "")


def _results(line: Lineage, evaluations: Sequence[Measured]) -> Iterator[Any]:
    """The same numbers for the hub's model-index: this model's only."""
    from huggingface_hub import EvalResult

    for evaluation in evaluations:
        model = evaluation.step.result["models"][evaluation.name]
        sources = evaluation.step.recipe.get("data", {}).get("validation", {})
        for key in _measures(model):
            for name, measure in model[key].items():
                source = sources.get(name) or {"path": "./"}
                kind = {"dataset_type": source["path"], "dataset_config": source.get("name"), "dataset_split": source.get("split")}
                yield EvalResult(
                    task_type="text-generation", dataset_name=name, metric_type=_METRICS.get(key, key), metric_value=_value(measure),
                    metric_name=_TITLES.get(key, key), **(kind if _on_hub(source) else {"dataset_type": f"{evaluation.step.name}/{name}"}),
                )  # fmt: skip
    last = line.steps[-1] if line.steps else None
    if last is not None and last.stage == "sft" and (last.result.get("held_out_loss") or {}).get("after") is not None:
        yield EvalResult(
            task_type="text-generation", dataset_type="held-out-conversations", dataset_name="held-out conversations",
            metric_type=_METRICS["held_out_loss"], metric_value=last.result["held_out_loss"]["after"], metric_name="Loss a trained token",
        )  # fmt: skip


def _environment(line: Lineage) -> str:
    found: dict[str, list[str]] = {}
    for step in line.steps:
        machine = step.environment
        gpus = ", ".join(dict.fromkeys(machine.get("gpus") or [])) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
        told = f"azrecipe {machine.get('azrecipe')}, Python {machine.get('python')}, {versions}; {machine.get('world_size')} processes, {gpus}, {machine.get('processor')}"
        found.setdefault(told, []).append(step.name)
    return "## Environment\n\n" + "\n".join(f"- {', '.join(names)}: {told}" for told, names in found.items())


def _limits(line: Lineage, evaluations: Sequence[Measured]) -> str:
    points = [
        "What stands in no table above was not measured: facts, reasoning, safety, bias and human preference among it, unless a table says otherwise."
    ]
    if line.steps and not evaluations:
        points.append("The model has not been compared with its base in one evaluation.")
    for evaluation in evaluations:
        small = [name for name, size in evaluation.step.result.get("validation", {}).items() if size.get("documents", 0) < 100]
        if small:
            points.append(f"The held-out text is small ({', '.join(small)}: fewer than 100 documents), so small differences mean little.")
    for step in line.steps:
        if step.stage == "sft":
            what = "preferences" if _preferences(step) else "conversations"
            points.append(
                f"It learned to answer from {step.result['data']['train']:,} {what}. Whether its answers are true was not checked."
            )
    if line.lost:
        points.append(f"The record is not complete: the run `{line.lost}` is missing.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _licence(about: About, terms: Terms | None) -> str:
    if terms is not None:
        more = f" {terms.built_with}." if terms.built_with else ""
        return f"## Licence\n\n[{terms.license}]({terms.url}), as its base.{more} {terms.notice}"
    return f"## Licence\n\n{about.license or 'Not stated.'}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|" + " --- |" * len(heads), *lines[1:]])


def of(model_run: Any) -> tuple[Lineage, list[Measured]]:
    """Everything that is recorded about a run's model."""
    return lineage.of(model_run), lineage.measured(model_run)
