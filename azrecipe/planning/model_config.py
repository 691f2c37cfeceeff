"""The configuration and vocabulary size of the model that a recipe trains.

Finished runs are read. For runs that have not happened yet, their recipes decide. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from azrecipe import hardware
from azrecipe.errors import CannotRun, CommandError
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.types import ModelSource, PretrainConfig, PretrainTokenizer, SftConfig, TokenizerConfig
from azrecipe.runs.run_dir import locate_named_run
from azrecipe.utils.paths import is_local_model

# Keys of a configuration that say nothing of the model's shapes
NON_SHAPE_KEYS = ("architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config", "_name_or_path")


@dataclass(frozen=True)
class ModelShape:
    """The shapes of a model as it trains.

    config: transformers' configuration, with the trained vocab_size. new_tokens: rows that the base model lacks. notes: assumptions.
    """

    config: Mapping[str, Any]
    new_tokens: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelLookup:
    """Where a recipe's model is looked for.

    recipes: the other recipes of its pipeline by name. config_json, vocab_size: the user's, instead of the model's.
    """

    runs_dir: Path
    recipes: Mapping[str, Recipe]
    config_json: Path | None = None
    vocab_size: int | None = None

    def load_recipe(self, dependent: Recipe, output_of: str) -> Recipe:
        """Return the recipe behind an `output_of`, from the pipeline or from disk."""
        recipe = self.recipes.get(Path(output_of).stem)
        return recipe if recipe is not None else load_recipe(Path(output_of), project=dependent.project)


class _Vocabulary(NamedTuple):
    """Rows of the embeddings, the new ones among them, and assumptions."""

    rows: int
    new_tokens: int
    notes: tuple[str, ...] = ()


def resolve_model_shape(recipe: Recipe, lookup: ModelLookup) -> ModelShape:
    """Resolve the shapes of a recipe's model as it trains.

    Raises CannotRun where the hub is needed and cannot be reached.
    """
    config: PretrainConfig | SftConfig = recipe.config
    base = _resolve_base(recipe, config.model, lookup)
    if lookup.vocab_size is not None:
        base_size = int(base.config["vocab_size"])
        added = max(lookup.vocab_size - base_size, 0) or lookup.vocab_size  # a smaller vocabulary is another one: all of it is new
        return ModelShape({**base.config, "vocab_size": lookup.vocab_size}, base.new_tokens or added, base.notes)
    if isinstance(config, SftConfig):
        return base
    vocabulary = _resolve_vocabulary(recipe, config.tokenizer, base, lookup)
    if vocabulary.rows < 1:
        raise CommandError(f"{recipe.path}: the size of its tokenizer is not known here: --vocab-size N")
    multiple = config.tokenizer.pad_to_multiple_of or 1
    rows = -(-vocabulary.rows // multiple) * multiple
    return ModelShape({**base.config, "vocab_size": rows}, vocabulary.new_tokens, (*base.notes, *vocabulary.notes))


def _resolve_base(recipe: Recipe, model: Any, around: ModelLookup) -> ModelShape:
    """Resolve the shapes of the model that training starts from."""
    if getattr(model, "config", None) is not None:
        return ModelShape({"vocab_size": 0, **model.config}, 0, ())
    if model.output_of is not None:
        run = locate_named_run(recipe, around.runs_dir, Path(model.output_of).stem)
        if run.is_complete and (run.final_dir / "config.json").is_file():
            return read_saved_model_shape(run.final_dir)
        parent = around.load_recipe(recipe, model.output_of)
        if not isinstance(parent.config, PretrainConfig | SftConfig):
            raise recipe.error(f"{model.output_of} is a {parent.stage} recipe and makes no model", "model", "output_of")
        return resolve_model_shape(parent, around)
    config, note = load_model_config(model, around.config_json)
    return ModelShape(config, 0, (note,) if note else ())


def read_saved_model_shape(folder: Path) -> ModelShape:
    """Read the shapes of a model that a run saved."""
    return ModelShape(_read_config(folder / "config.json"), _read_new_token_count(folder), ())


def load_model_config(model: ModelSource, config_json: Path | None = None) -> tuple[dict[str, Any], str]:
    """Load a model's config.json, with a note on its source.

    The user's file comes first, then the model's folder, the hub's cache, azrecipe's table, the hub.
    The note is "" but for azrecipe's table.
    """
    path = model.name_or_path
    assert path is not None
    if config_json is not None:
        return _read_config(config_json), ""
    if is_local_model(path) or Path(path).is_dir():
        file = Path(path) / "config.json"
        if not file.is_file():
            raise CommandError(f"{path} has no config.json: it is no model's folder")
        return _read_config(file), ""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json", revision=model.revision)
    if isinstance(cached, str):
        return _read_config(Path(cached)), ""
    if (shipped := load_shipped_configs().get(path)) is not None:
        return dict(shipped), f"the shapes of {path} are from azrecipe's own table, hardware/models.yaml"
    return _fetch_config(path, model.revision), ""


def _fetch_config(name: str, revision: str | None) -> dict[str, Any]:
    """Fetch a model's config.json from the hub.

    Without retries, so that a machine without a network fails in seconds.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    try:
        response = get_session().get(hf_hub_url(name, "config.json", revision=revision), headers=build_hf_headers(), timeout=5)
        hf_raise_for_status(response)
        return _parse_config(response.content, name)
    except CommandError:
        raise
    except Exception as error:  # what the hub's client raises has many bases
        reason = str(error).strip().partition("\n")[0]
        raise CannotRun(
            f"the configuration of {name} cannot be fetched: {reason}\n"
            f"  Give its config.json: --config-json FILE (from {name} on the hub, or any model of the same shapes)"
        ) from None


def load_shipped_configs() -> dict[str, Any]:
    """Load the configurations in hardware/models.yaml, by model name."""
    configs: dict[str, Any] = hardware.read_shipped_file("models.yaml").to_plain()
    return configs


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return _parse_config(file.read_bytes(), str(file))
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None


def _parse_config(content: bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CommandError(f"{name}: not JSON: {error}") from None
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    required = {"model_type": "", "vocab_size": "", "hidden_size": "n_embd", "num_hidden_layers": "n_layer"}  # and GPT-2's names
    missing = [key for key, gpt2_key in required.items() if key not in text and gpt2_key not in text]
    if missing:
        raise CommandError(f"{name}: no configuration of a language model: it lacks {', '.join(missing)}")
    return {key: value for key, value in text.items() if key not in NON_SHAPE_KEYS}


def _read_new_token_count(folder: Path) -> int:
    file = folder / "new_tokens.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["count"]) if file.is_file() else 0


def _resolve_vocabulary(recipe: Recipe, tokenizer: PretrainTokenizer, base: ModelShape, around: ModelLookup) -> _Vocabulary:
    base_rows = int(base.config["vocab_size"])
    if tokenizer.family is not None:
        assert tokenizer.vocab_size is not None
        return _Vocabulary(tokenizer.vocab_size, 0)
    if tokenizer.name_or_path is not None:
        return _read_tokenizer_size(Path(tokenizer.name_or_path), base_rows)
    if tokenizer.output_of is None:
        return _Vocabulary(base_rows, base.new_tokens)
    run = locate_named_run(recipe, around.runs_dir, Path(tokenizer.output_of).stem)
    if run.is_complete:
        folder = run.path / "candidates" / tokenizer.candidate if tokenizer.candidate else run.final_dir
        return _read_tokenizer_size(folder, base_rows)
    tokenizer_recipe = around.load_recipe(recipe, tokenizer.output_of)
    if not isinstance(tokenizer_recipe.config, TokenizerConfig):
        return _Vocabulary(base_rows, base.new_tokens)
    return _plan_tokenizer_size(tokenizer_recipe, tokenizer.candidate, base_rows)


def _read_tokenizer_size(folder: Path, base_rows: int) -> _Vocabulary:
    """Read a saved tokenizer's size: one more than its highest id."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens", []))]
        size = max(ids) + 1
        return _Vocabulary(size, max(size - base_rows, 0) or size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        note = f"the size of the tokenizer {folder} is not known here and taken as the base model's: --vocab-size N"
        return _Vocabulary(base_rows, 0, (note,))


def _plan_tokenizer_size(recipe: Recipe, name: str | None, base_rows: int) -> _Vocabulary:
    """Plan the size of a tokenizer that has not been trained yet.

    The named or selected candidate counts, else the largest.
    """
    sizes: dict[str, _Vocabulary] = {}
    for key, candidate in recipe.config.candidates.items():
        if candidate.new_tokens is not None:
            sizes[key] = _Vocabulary(base_rows + candidate.new_tokens, candidate.new_tokens)
        elif candidate.vocab_size is not None:
            sizes[key] = _Vocabulary(candidate.vocab_size, candidate.vocab_size)
        else:
            sizes[key] = _Vocabulary(base_rows, 0)
    selected = name or recipe.config.select
    if selected in sizes:
        return sizes[selected]
    key = max(sizes, key=lambda candidate: sizes[candidate].rows)
    note = f"{recipe.path.name} has not been run: the plan takes its largest candidate ({key}, {sizes[key].rows:,} tokens); --vocab-size N for another"
    return sizes[key]._replace(notes=(note,))
