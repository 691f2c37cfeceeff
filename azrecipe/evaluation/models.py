"""Models to be evaluated: a folder, a hub id, or a LoRA adapter on its base; looked at before anything long begins, then loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.data.inputs import Inputs
from azrecipe.errors import CannotRun, CommandError, Problem, RecipeError
from azrecipe.modeling import loading
from azrecipe.modeling.lora import Base, merged
from azrecipe.recipe.types import EvaluateModel, Model
from azrecipe.tokenization import tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Subject:
    """A model: `path` is the base's, `adapter` the folder of what is put on it, `tokenizer` where its tokenizer is."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    tokenizer: str = ""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer.load_tokenizer(self.tokenizer, self.revision if self.tokenizer == self.path else None)

    def load(self, precision: str) -> PreTrainedModel:
        """The model, an adapter merged into it, in evaluation mode."""
        if self.adapter is None:
            return loading.load_model(self.path, precision, revision=self.revision).eval()
        base = Base(self.path, Model(self.path, self.revision), self.load_tokenizer())
        return merged(base, Path(self.adapter), precision).eval()

    @property
    def what(self) -> tuple[str | None, ...]:
        """What tells it from another model."""
        return tuple(None if part is None else _real(part) for part in (self.path, self.revision, self.adapter))


def find(inputs: Inputs, asked: Mapping[str, EvaluateModel]) -> tuple[dict[str, Subject], dict[str, PreTrainedTokenizerBase]]:
    """The models of a recipe and their tokenizers. Raises RecipeError with everything that is wrong with them, or CannotRun."""
    found: dict[str, Subject] = {}
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    problems: list[Problem] = []
    for name, source in asked.items():
        try:
            subject = _subject(inputs.folder(source, "models", name), source)
            same = next((other for other, before in found.items() if before.what == subject.what), None)
            if same:
                raise CommandError(f"'{name}' is the same model as '{same}': measure it once")
            found[name] = subject
            tokenizers[name] = _checked(subject)
        except RecipeError as error:
            problems += error.problems
        except CommandError as error:
            problems += inputs.recipe.problem(str(error), "models", name).problems
    if problems:
        raise RecipeError(problems)
    return found, tokenizers


def _subject(path: str, source: EvaluateModel) -> Subject:
    if source.adapter is None and not Path(path, ADAPTER).is_file():
        return Subject(path, source.revision, tokenizer=path)
    adapter = source.adapter or path
    if source.adapter and not Path(adapter, ADAPTER).is_file():
        raise CommandError(f"{adapter} is no adapter's folder: there is no {ADAPTER} in it")
    base = _config(adapter).get("base_model_name_or_path")
    if not base:
        raise CommandError(f"{adapter}/{ADAPTER} does not name the adapter's base: say it, name_or_path: ./base with adapter: {adapter}")
    if source.adapter is None:
        local = any(mark in base for mark in (os.sep + "final", "./")) or os.path.isabs(base)
        if local and not Path(base).is_dir():
            raise CommandError(f"the adapter {adapter} was trained on {base}, and there is no such folder here: give it as name_or_path, with adapter: {adapter}")  # fmt: skip
        path = base
    elif not _alike(path, base):
        raise CommandError(f"the adapter {adapter} was trained on {base}, and this model is {path}: on another base it means nothing")
    return Subject(path, source.revision, adapter, _tokenizer_of(adapter, path))


def _tokenizer_of(adapter: str, base: str) -> str:
    """Where an adapter's tokenizer is, which may have a chat template that the base's has not: with it, in its run's final/, or the base's."""
    for folder in (Path(adapter), Path(adapter).parent / "final"):
        if (folder / "tokenizer_config.json").is_file():
            return str(folder)
    return base


def _checked(subject: Subject) -> PreTrainedTokenizerBase:
    """A model's tokenizer, once the two are known to belong together and its weights to be there."""
    net = loading.skeleton(subject.path, revision=subject.revision)
    if Path(subject.path).is_dir():
        _check_weights(subject.path)
    if subject.adapter is not None:
        _check_fit(subject.adapter, subject.path, net)
    tokenizer = subject.load_tokenizer()
    if subject.adapter is None:  # an adapter may bring rows for tokens that its chat template has added
        loading.check_sizes(net, tokenizer, subject.path)
    return tokenizer


def _check_weights(folder: str) -> None:
    there = next((file for name in WEIGHTS if (file := Path(folder, name)).is_file()), None)
    if there is None:
        raise CommandError(f"the folder {folder} holds a model's configuration and no weights: there is none of {', '.join(WEIGHTS)}")
    if there.name.endswith("index.json"):
        parts = sorted(set(json.loads(there.read_text(encoding="utf-8"))["weight_map"].values()))
        gone = [part for part in parts if not Path(folder, part).is_file()]
        if gone:
            raise CommandError(f"the folder {folder} lacks {len(gone)} of the {len(parts)} files of its model: {', '.join(gone[:3])}")


def _check_fit(adapter: str, base: str, net: Any) -> None:
    """Refuse an adapter with a layer that the base has not, or has in another size. Its matrices A are [r, in], B [out, r]."""
    from safetensors import SafetensorError, safe_open

    file = Path(adapter, "adapter_model.safetensors")
    if not file.is_file():
        raise CommandError(f"the adapter's folder {adapter} holds no weights: there is no {file.name}")
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CommandError(f"{file}: cannot be read: {error}") from None
    layers = dict(net.named_modules())
    for key, shape in shapes.items():
        for mark, own, theirs in ((".lora_A.", "in_features", 1), (".lora_B.", "out_features", 0)):
            if mark not in key:
                continue
            name = key.partition(mark)[0].removeprefix("base_model.model.")
            size = getattr(layers.get(name), own, None)
            if name not in layers:
                raise CommandError(f"the adapter {adapter} is for another base than {base}: it has a layer {name}, and the base has none")
            if size is not None and size != shape[theirs]:
                raise CommandError(
                    f"the adapter {adapter} is for another base than {base}: its layer {name} has {own} {shape[theirs]:,}, the base's {size:,}"
                )


def _config(adapter: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path(adapter, ADAPTER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{adapter}/{ADAPTER}: not JSON: {error}") from None
    if found.get("peft_type") != "LORA":
        raise CannotRun(f"{adapter} is an adapter of kind {found.get('peft_type')}: LoRA is what can be evaluated")
    return found


def _alike(mine: str, base: str) -> bool:
    """Whether two paths or hub ids name one model: the same place, or the same name (a run's final/ by the run's name)."""
    if _real(mine) == _real(base):
        return True
    a, b = ([part for part in Path(path).parts if part != "final"][-1:] for path in (mine, base))
    return a == b


def _real(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path
