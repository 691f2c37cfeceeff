"""Find, check and load the models that are evaluated.

A model is a folder, a hub id, or a LoRA adapter on its base. All are checked before anything long begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from azrecipe.data.inputs import Inputs
from azrecipe.errors import CannotRun, CommandError, Problem, RecipeError
from azrecipe.modeling import loading
from azrecipe.modeling.lora import BaseModel, merge_adapter
from azrecipe.modeling.weight_checks import read_tensor_shapes
from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.recipe.types import EvaluateModel, Model
from azrecipe.recipe.yaml_tree import Key
from azrecipe.tokenization import tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class EvaluatedModel:
    """A plain model, or a base with an adapter.

    `path` is the base's, `adapter` the adapter's folder, and `tokenizer_path` where the tokenizer is.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    tokenizer_path: str = ""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer."""
        return tokenizer.load_tokenizer(self.tokenizer_path, self.revision if self.tokenizer_path == self.path else None)

    def load(self, precision: str, attn_implementation: str = AUTO) -> PreTrainedModel:
        """Load the model in evaluation mode, with its adapter merged."""
        if self.adapter is None:
            return loading.load_model(self.path, precision, attn_implementation, self.revision).eval()
        base = BaseModel(self.path, Model(self.path, self.revision, attn_implementation=attn_implementation), self.load_tokenizer())
        return merge_adapter(base, Path(self.adapter), precision).eval()

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What distinguishes the model from another one."""
        return tuple(None if part is None else _resolve_path(part) for part in (self.path, self.revision, self.adapter))


class EvaluatedModels(NamedTuple):
    """Models and their tokenizers, both by name."""

    models: dict[str, EvaluatedModel]
    tokenizers: dict[str, PreTrainedTokenizerBase]


def find_models(inputs: Inputs, sources: Mapping[str, EvaluateModel]) -> EvaluatedModels:
    """Find a recipe's models and check them.

    Args:
        inputs: The recipe's inputs.
        sources: The recipe's models by name.

    Raises:
        RecipeError: Models are wrong; it holds every problem.
        CannotRun: A model is of a kind that cannot be evaluated.
    """
    models: dict[str, EvaluatedModel] = {}
    tokenizers: dict[str, PreTrainedTokenizerBase] = {}
    problems: list[Problem] = []
    for name, source in sources.items():
        try:
            model = locate_model(inputs, source, "models", name)
            duplicate = next((other for other, earlier in models.items() if earlier.identity == model.identity), None)
            if duplicate:
                raise CommandError(f"'{name}' is the same model as '{duplicate}': name it once")
            models[name] = model
            tokenizers[name] = check_model(model)
        except RecipeError as error:
            problems += error.problems
        except CommandError as error:
            problems += inputs.recipe.error(str(error), "models", name).problems
    if problems:
        raise RecipeError(problems)
    return EvaluatedModels(models, tokenizers)


def locate_model(inputs: Inputs, source: EvaluateModel, *keys: Key) -> EvaluatedModel:
    """Locate a model's base, adapter and tokenizer.

    Args:
        inputs: The recipe's inputs.
        source: The model's entry in the recipe.
        keys: Where the entry is.

    Raises:
        RecipeError: The run that it names is not complete.
        CommandError: Its adapter is wrong.
    """
    path = inputs.find_model(source, *keys)
    if source.adapter is None and not Path(path, ADAPTER_CONFIG_FILE).is_file():
        return EvaluatedModel(path, source.revision, tokenizer_path=path)
    adapter = source.adapter or path
    if source.adapter and not Path(adapter, ADAPTER_CONFIG_FILE).is_file():
        raise CommandError(f"{adapter} is not the folder of an adapter: it has no {ADAPTER_CONFIG_FILE}")
    base = _read_adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise CommandError(
            f"{adapter}/{ADAPTER_CONFIG_FILE} does not name the adapter's base: set name_or_path: ./base with adapter: {adapter}"
        )
    if source.adapter is None:
        local = any(mark in base for mark in (os.sep + "final", "./")) or os.path.isabs(base)
        if local and not Path(base).is_dir():
            raise CommandError(f"the adapter {adapter} was trained on {base}, and there is no such folder here: set it as name_or_path, with adapter: {adapter}")  # fmt: skip
        path = base
    elif not _is_same_model(path, base):
        raise CommandError(f"the adapter {adapter} was trained on {base}, and this model is {path}: an adapter fits its own base only")
    return EvaluatedModel(path, source.revision, adapter, _find_tokenizer(adapter, path))


def _find_tokenizer(adapter: str, base: str) -> str:
    """Find an adapter's tokenizer.

    It is beside the adapter, in its run's final/, or the base's. The adapter's may have a chat template that the base's lacks.
    """
    for folder in (Path(adapter), Path(adapter).parent / "final"):
        if (folder / "tokenizer_config.json").is_file():
            return str(folder)
    return base


def check_model(model: EvaluatedModel) -> PreTrainedTokenizerBase:
    """Check that weights and tokenizer fit together; return the tokenizer."""
    meta_model = loading.load_meta_model(model.path, revision=model.revision)
    if model.adapter is not None:
        _check_fit(model.adapter, model.path, meta_model)
    tokenizer = model.load_tokenizer()
    if model.adapter is None:  # an adapter may add rows for the tokens of its chat template
        loading.check_vocabulary_size(meta_model, tokenizer, model.path)
    return tokenizer


def _check_fit(adapter: str, base: str, meta_model: Any) -> None:
    """Check that the base has the adapter's layers in the same sizes.

    An adapter's matrices A are [r, in], B [out, r]. Raises CommandError.
    """
    file = Path(adapter, "adapter_model.safetensors")
    if not file.is_file():
        raise CommandError(f"the adapter's folder {adapter} holds no weights: it has no {file.name}")
    shapes = read_tensor_shapes(file)
    layers = dict(meta_model.named_modules())
    for key, shape in shapes.items():
        for mark, attribute, dimension in ((".lora_A.", "in_features", 1), (".lora_B.", "out_features", 0)):
            if mark not in key:
                continue
            name = key.partition(mark)[0].removeprefix("base_model.model.")
            size = getattr(layers.get(name), attribute, None)
            if name not in layers:
                raise CommandError(f"the adapter {adapter} is for another base than {base}: it has a layer {name}, and the base has none")
            if size is not None and size != shape[dimension]:
                raise CommandError(
                    f"the adapter {adapter} is for another base than {base}: its layer {name} has {attribute} {shape[dimension]:,}, the base's {size:,}"
                )


def _read_adapter_config(adapter: str) -> dict[str, Any]:
    """Read an adapter's configuration; only LoRA is supported."""
    try:
        config: dict[str, Any] = json.loads(Path(adapter, ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{adapter}/{ADAPTER_CONFIG_FILE}: not JSON: {error}") from None
    if config.get("peft_type") != "LORA":
        raise CannotRun(f"{adapter} is an adapter of kind {config.get('peft_type')}: only LoRA can be evaluated")
    return config


def _is_same_model(path: str, base: str) -> bool:
    """Tell whether two paths or hub ids name one model.

    They do if they are the same place or have the same name. A run's final/ has the name of the run.
    """
    if _resolve_path(path) == _resolve_path(base):
        return True
    path_name, base_name = ([part for part in Path(name).parts if part != "final"][-1:] for name in (path, base))
    return path_name == base_name


def _resolve_path(path: str) -> str:
    """Resolve a path that exists; a hub id stays as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
