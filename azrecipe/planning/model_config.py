"""Knows the configuration and the vocabulary of the model that a recipe trains, whether it exists yet or not. No torch.

What a finished run left is read; what no run has made yet follows from the recipes that will make it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe import hardware
from azrecipe.errors import CannotRun, CommandError
from azrecipe.recipe.load import Recipe, load
from azrecipe.recipe.types import ModelSource, Pretrain, PretrainTokenizer, Sft, Tokenizer
from azrecipe.runs.run_dir import run_of
from azrecipe.utils.paths import is_local_model

NO_SHAPE = ("architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config", "_name_or_path")  # of a configuration


@dataclass(frozen=True)
class ModelShape:
    """config: transformers' own, with the vocab_size that is trained. new_tokens: rows that the base lacks. notes: what was assumed."""

    config: Mapping[str, Any]
    new_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Around:
    """Where a recipe's model is looked for: runs, the other recipes of its pipeline by name, and a configuration given instead of a hub's."""

    runs_dir: Path
    recipes: Mapping[str, Recipe]
    config_json: Path | None = None
    vocab_size: int | None = None

    def recipe(self, asker: Recipe, output_of: str) -> Recipe:
        """The recipe behind an `output_of`."""
        found = self.recipes.get(Path(output_of).stem)
        return found if found is not None else load(Path(output_of), project=asker.project)


def shape_of(recipe: Recipe, around: Around) -> ModelShape:
    """The model of a pretrain or sft recipe as it trains. Raises CannotRun where the hub is asked for and cannot be reached."""
    config: Pretrain | Sft = recipe.config
    found = _base(recipe, config.model, around)
    if around.vocab_size is not None:
        more = max(around.vocab_size - int(found.config["vocab_size"]), 0) or around.vocab_size  # a smaller one is another one
        return ModelShape({**found.config, "vocab_size": around.vocab_size}, found.new_tokens or more, found.notes)
    if isinstance(config, Sft):
        return found
    rows, new, notes = _vocabulary(recipe, config.tokenizer, found, around)
    if rows < 1:
        raise CommandError(f"{recipe.path}: the size of its tokenizer is not known here: --vocab-size N")
    multiple = config.tokenizer.pad_to_multiple_of or 1
    return ModelShape({**found.config, "vocab_size": -(-rows // multiple) * multiple}, new, (*found.notes, *notes))


def _base(recipe: Recipe, model: Any, around: Around) -> ModelShape:
    """The model that training starts from."""
    if getattr(model, "config", None) is not None:
        return ModelShape({"vocab_size": 0, **model.config}, 0, ())
    if model.output_of is not None:
        run = run_of(recipe, around.runs_dir, Path(model.output_of).stem)
        if run.complete and (run.final / "config.json").is_file():
            return of_folder(run.final)
        before = around.recipe(recipe, model.output_of)
        if not isinstance(before.config, Pretrain | Sft):
            raise recipe.problem(f"{model.output_of} is a {before.stage} recipe and makes no model", "model", "output_of")
        return shape_of(before, around)
    config, note = configuration(model, around.config_json)
    return ModelShape(config, 0, (note,) if note else ())


def of_folder(folder: Path) -> ModelShape:
    """The model that a run saved in a folder."""
    return ModelShape(_read(folder / "config.json"), _new_tokens(folder), ())


def configuration(model: ModelSource, given: Path | None = None) -> tuple[dict[str, Any], str]:
    """A model's config.json: a file given, a folder's, the hub's, or this project's table of shapes; and a note for the last."""
    path = model.name_or_path
    assert path is not None
    if given is not None:
        return _read(given), ""
    if is_local_model(path) or Path(path).is_dir():
        file = Path(path) / "config.json"
        if not file.is_file():
            raise CommandError(f"{path} holds no config.json: it is no model's folder")
        return _read(file), ""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=model.revision)
    if isinstance(cached, str):
        return _read(Path(cached)), ""
    if (known := known_shapes().get(path)) is not None:
        return dict(known), f"the shapes of {path} are from azrecipe's own table, hardware/models.yaml"
    return _fetched(path, model.revision), ""


def _fetched(name: str, revision: str | None) -> dict[str, Any]:
    """A model's config.json from the hub, asked once: a machine without a network is told so in seconds."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    try:
        response = get_session().get(hf_hub_url(name, "config.json", revision=revision), headers=build_hf_headers(), timeout=5)
        hf_raise_for_status(response)
        return _parsed(response.content, name)
    except CommandError:
        raise
    except Exception as error:  # what the hub's client raises has many bases
        reason = str(error).strip().partition("\n")[0]
        raise CannotRun(
            f"the configuration of {name} cannot be fetched: {reason}\n"
            f"  Give its config.json: --config-json FILE (from {name} on the hub, or any model of the same shapes)"
        ) from None


def known_shapes() -> dict[str, Any]:
    """Configurations by the names of their models: hardware/models.yaml."""
    known: dict[str, Any] = hardware.shipped("models.yaml").plain()
    return known


def _read(file: Path) -> dict[str, Any]:
    try:
        return _parsed(file.read_bytes(), str(file))
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None


def _parsed(content: bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CommandError(f"{name}: not JSON: {error}") from None
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    needed = {"model_type": "", "vocab_size": "", "hidden_size": "n_embd", "num_hidden_layers": "n_layer"}  # and GPT-2's names
    missing = [key for key, other in needed.items() if key not in text and other not in text]
    if missing:
        raise CommandError(f"{name}: no configuration of a language model: it lacks {', '.join(missing)}")
    return {key: value for key, value in text.items() if key not in NO_SHAPE}


def _new_tokens(folder: Path) -> int:
    file = folder / "new_tokens.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["count"]) if file.is_file() else 0


def _vocabulary(recipe: Recipe, asked: PretrainTokenizer, base: ModelShape, around: Around) -> tuple[int, int, list[str]]:
    """Rows of the embeddings, how many of them are new, and what was assumed for that."""
    own = int(base.config["vocab_size"])
    if asked.family is not None:
        assert asked.vocab_size is not None
        return asked.vocab_size, 0, []
    if asked.name_or_path is not None:
        return _of_tokenizer(Path(asked.name_or_path), own)
    if asked.output_of is None:
        return own, base.new_tokens, []
    run = run_of(recipe, around.runs_dir, Path(asked.output_of).stem)
    if run.complete:
        folder = run.path / "candidates" / asked.candidate if asked.candidate else run.final
        return _of_tokenizer(folder, own)
    maker = around.recipe(recipe, asked.output_of)
    if not isinstance(maker.config, Tokenizer):
        return own, base.new_tokens, []
    return _planned(maker, asked.candidate, own)


def _of_tokenizer(folder: Path, own: int) -> tuple[int, int, list[str]]:
    """Of a tokenizer that is there: one more than its highest id."""
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [*found["model"]["vocab"].values(), *(token["id"] for token in found.get("added_tokens", []))]
        size = max(ids) + 1
        return size, max(size - own, 0) or size, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return own, 0, [f"the size of the tokenizer {folder} is not known here and taken as the base model's: --vocab-size N"]


def _planned(maker: Recipe, name: str | None, own: int) -> tuple[int, int, list[str]]:
    """Of a tokenizer that its recipe will make: the candidate named, or the largest of those that it may choose."""
    sizes: dict[str, tuple[int, int]] = {}
    for key, candidate in maker.config.candidates.items():
        if candidate.new_tokens is not None:
            sizes[key] = (own + candidate.new_tokens, candidate.new_tokens)
        elif candidate.vocab_size is not None:
            sizes[key] = (candidate.vocab_size, candidate.vocab_size)
        else:
            sizes[key] = (own, 0)
    chosen = name or getattr(maker.config, "select", None)
    if chosen in sizes:
        return *sizes[chosen], []
    key = max(sizes, key=lambda each: sizes[each][0])
    note = f"{maker.path.name} has not been run: its largest candidate ({key}, {sizes[key][0]:,} tokens) is planned with; --vocab-size N for another"
    return *sizes[key], [note]
