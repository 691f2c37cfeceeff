"""Stage merge: several models' weights into one model, without training.

One process, in main memory. Weights are read and written one tensor at a time. A run that is killed starts anew.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.data.inputs import Inputs
from azrecipe.distributed.backend import Backend
from azrecipe.errors import CannotRun, CommandError, RecipeError
from azrecipe.evaluation import models as model_sources
from azrecipe.evaluation.models import EvaluatedModel
from azrecipe.merging.merge import BASE, MergePlan, plan_merge, write_merged_weights
from azrecipe.merging.shard_writer import ShardWriter
from azrecipe.merging.weight_files import WeightFiles, open_weight_files
from azrecipe.modeling import config_file, loading, new_tokens
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import MergeConfig
from azrecipe.runs.finished_model import download_snapshot
from azrecipe.runs.run_dir import RunDir, check_run_matches, locate_run, open_run
from azrecipe.tokenization.tokenizer import save_tokenizer
from azrecipe.utils.atomic_files import atomic_folder
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFINITIONS = {
    "rows": "rows of the embedding matrices: merged: of tokens that all models (and the base) have; special: copied from the model of "
    "special_tokens_from; kept: of other tokens, from the model of tokenizer_of; padding: without a token, from that model too",
}  # fmt: skip
SOURCES_FOLDER = "sources"  # models whose weights had to be opened and written anew; removed at the end
PROGRESS_STEPS = 10  # lines that a merge prints


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Check, merge and write the model, in the main process alone."""
    if not backend.main:
        return {}
    config: MergeConfig = recipe.config
    run_dir = locate_run(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused without weights is refused here.
    checked = check(recipe, inputs)
    plan = checked.plan
    check_run_matches(recipe, run_dir, inputs.fingerprints)
    size = sum(parameter.numel() for parameter in plan.model.parameters()) * plan.dtype.itemsize
    run_dir.require_disk_space(size, "writing the merged model")

    with open_run(recipe, run_dir, inputs.fingerprints):
        with _open_sources(checked, run_dir) as files, atomic_folder(run_dir.final_dir) as folder:
            writer = ShardWriter(folder)
            write_merged_weights(plan, files, writer, _print_progress)
            writer.finish()
            _write_settings(checked, folder)
        loading.check_weight_files(str(run_dir.final_dir))
        result = {
            "stage": "merge",
            "method": config.method,
            "tokenizer_of": plan.target,
            "models": {name: _describe_source(model) for name, model in checked.models.items()},
            "parameters": loading.count_parameters(plan.model),
            "vocab_size": len(checked.tokenizers[plan.target]),
            "rows": plan.rows.count(),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "bytes": writer.total_bytes,
            "definitions": DEFINITIONS,
        }
        run_dir.mark_complete(result)
    return result


@dataclass(frozen=True)
class MergeInputs:
    """The models of a recipe, checked as far as possible without weights.

    All are by the models' names; the base is under BASE.
    """

    config: MergeConfig
    models: Mapping[str, EvaluatedModel]
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    meta_models: Mapping[str, PreTrainedModel]
    plan: MergePlan


def check(recipe: Recipe, inputs: Inputs) -> MergeInputs:
    """Refuse what can be refused before weights are read."""
    config: MergeConfig = recipe.config
    models, tokenizers = model_sources.find_models(inputs, config.models)
    if config.base is not None:
        try:
            models[BASE] = model_sources.locate_model(inputs, config.base, "base")
            tokenizers[BASE] = model_sources.check_model(models[BASE])
        except CommandError as error:
            raise error if isinstance(error, RecipeError) else recipe.error(str(error), "base") from None
    meta_models = {name: loading.load_meta_model(model.path, model.revision) for name, model in models.items()}
    try:
        plan = plan_merge(config, meta_models, tokenizers)
    except CommandError as error:
        raise recipe.error(str(error), "models") from None
    return MergeInputs(config, models, tokenizers, meta_models, plan)


def _describe_source(model: EvaluatedModel) -> dict[str, str]:
    return {"path": model.path, **({"adapter": model.adapter} if model.adapter is not None else {})}


@contextmanager
def _open_sources(checked: MergeInputs, run_dir: RunDir) -> Iterator[dict[str, WeightFiles]]:
    """Open the weights of all models.

    Weights that are not in safetensors files under the model's own names, or that an adapter changes, are opened whole and written
    anew into a folder that exists within the block.
    """
    folder = run_dir.path / SOURCES_FOLDER
    try:
        yield {name: _open_source(name, checked, folder) for name in checked.models}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_source(name: str, checked: MergeInputs, folder: Path) -> WeightFiles:
    model, meta_model = checked.models[name], checked.meta_models[name]
    if model.adapter is None:
        files = open_weight_files(download_snapshot(model.path, model.revision), meta_model)
        if files is not None:
            return files
    print_progress(f"  {name}: opening the whole model{', with its adapter' if model.adapter else ''}")
    loaded = model.load("bf16_pure" if meta_model.config.dtype is not None and meta_model.config.dtype.itemsize == 2 else "float32")
    loading.save_model(loaded, checked.tokenizers[name], folder / name)
    del loaded
    gc.collect()
    files = open_weight_files(str(folder / name), meta_model)
    if files is None:
        raise CannotRun(
            f"models.{name}: a {meta_model.config.model_type} is stored under other names than it has in memory, and cannot be merged"
        )
    return files


def _print_progress(done: int, total: int) -> None:
    if done * PROGRESS_STEPS // total != (done - 1) * PROGRESS_STEPS // total:
        print_progress(f"  merged {done:,} of {total:,} weights")


def _write_settings(checked: MergeInputs, folder: Path) -> None:
    """Write configuration, tokenizer and new tokens beside the merged weights."""
    plan = checked.plan
    model, tokenizer = plan.model, checked.tokenizers[plan.target]
    model.config.dtype = plan.dtype
    generation_config = _load_generation_config(checked, plan.target)
    if plan.special_tokens_from is not None:
        other_tokenizer = checked.tokenizers[plan.special_tokens_from]
        if other_tokenizer.chat_template is not None:
            tokenizer.chat_template = other_tokenizer.chat_template
        if other_tokenizer.eos_token is not None:
            tokenizer.eos_token = other_tokenizer.eos_token
        end_ids = _translate_end_ids(_load_generation_config(checked, plan.special_tokens_from).eos_token_id, other_tokenizer, tokenizer)
        if end_ids:
            model.config.eos_token_id = generation_config.eos_token_id = end_ids[0] if len(end_ids) == 1 else end_ids
    model.config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    config_file.add_legacy_keys(folder, model.config)
    save_tokenizer(tokenizer, folder)
    new_tokens.save_new_tokens(new_tokens.find_new_tokens(checked.models[plan.target].path, tokenizer, tokenizer), folder)


def _load_generation_config(checked: MergeInputs, name: str) -> GenerationConfig:
    """Load how a model generates, from its file or its configuration."""
    from transformers import GenerationConfig

    model = checked.models[name]
    try:
        return GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(checked.meta_models[name].config)


def _translate_end_ids(ids: int | list[int] | None, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> list[int]:
    """Return the new ids of the tokens that end an answer."""
    tokens = old.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids or [])
    vocabulary = new.get_vocab()
    return [vocabulary[token] for token in dict.fromkeys(tokens) if token in vocabulary]
