"""What a pretrain recipe reads, for run, check and prepare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.data.inputs import Inputs
from azrecipe.data.mixture import Mix, Mixture, compute_temperature_weights
from azrecipe.data.packing import build_layout, build_packing, get_delimiters
from azrecipe.data.phase_schedule import OutOfText, PhaseSchedule, Position, plan_phases
from azrecipe.data.preparation import PretrainText, tokenize_sources
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import describe_source, mix_documents
from azrecipe.data.token_store import TokenStore
from azrecipe.errors import Problem, RecipeError
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import PretrainConfig
from azrecipe.runs.run_dir import locate_run
from azrecipe.tokenization import bpe_training
from azrecipe.tokenization.tokenizer import load_tokenizer, save_tokenizer
from azrecipe.utils.atomic_files import atomic_folder, hold_lock, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PretrainInputs:
    """The inputs of one pretrain recipe; a resume compares all of them.

    Attributes:
        recipe: The recipe.
        model_path: Folder or hub id of the base model; None where `model.config` describes a new one.
        data_position: Where the data go on, for `data.continue_from`.
        sources: data.datasets, in their order.
        held_out: The documents of each validation set.
        held_out_hashes: Hashes of the held-out documents before any clean-up.
        tokenizer: The tokenizer to train with.
        fingerprints: What a resume compares, by recipe key.
        cache_dir: Where tokenised text is kept.
    """

    recipe: Recipe
    model_path: str | None
    data_position: Position | None
    sources: Sequence[DataSource]
    held_out: Mapping[str, list[str]]
    held_out_hashes: frozenset[bytes]
    tokenizer: PreTrainedTokenizerBase
    fingerprints: Mapping[str, str]
    cache_dir: Path

    @classmethod
    def load(cls, recipe: Recipe, runs_dir: Path) -> PretrainInputs:
        """Open everything that a recipe names; needs no model weights.

        Raises:
            RecipeError: An input is missing or cannot be read.
            CannotRun: The hub or S3 cannot be reached.
        """
        config: PretrainConfig = recipe.config
        inputs = Inputs(recipe, runs_dir)
        cache_dir = locate_run(recipe, runs_dir).cache_dir
        model_path = None if config.model.config is not None else inputs.find_model(config.model, "model")
        data_position = _load_data_position(recipe, inputs)
        sources = inputs.locate_datasets(list(config.data.datasets))
        held_out = inputs.read_validation(config.data.validation)
        tokenizer = _load_or_train_tokenizer(config, inputs, sources, cache_dir, model_path)
        return cls(
            recipe=recipe,
            model_path=model_path,
            data_position=data_position,
            sources=sources,
            held_out=held_out,
            held_out_hashes=frozenset(inputs.raw_hashes),
            tokenizer=tokenizer,
            fingerprints=dict(inputs.fingerprints),
            cache_dir=cache_dir,
        )

    @property
    def config(self) -> PretrainConfig:
        config: PretrainConfig = self.recipe.config
        return config

    def build_mixture(self) -> Mixture:
        """Tokenise the sources into the cache, deduplicate and mix them.

        Raises:
            RecipeError: The data cannot go on from `continue_from`.
        """
        data = self.config.data
        text = PretrainText(self.sources, self.held_out, self.held_out_hashes)
        stores = tokenize_sources(self.config, text, self.tokenizer, self.cache_dir)
        limits = None
        if data.stopping_strategy == "all_exhausted_without_replacement":
            limits = [1.0 if source.max_epochs is None else source.max_epochs for source in data.datasets]
        read = list(self.data_position.mixes) if self.data_position else []
        if read and len(read[0].weights) != len(stores):
            raise self._build_position_error()
        weights = read.pop(0).weights if read else self._list_weights(stores)[0]
        mixture = Mixture(stores, weights, self.config.seed, get_delimiters(self.tokenizer).count, limits)
        for mix in read:
            mixture.change_weights(mix.token, mix.weights)
        return mixture

    def _list_weights(self, stores: Sequence[TokenStore]) -> list[list[float]]:
        """List the weights of the sources in each phase."""
        temperature = self.config.data.sampling_temperature
        if temperature is not None:
            return [compute_temperature_weights(stores, temperature)] * len(self.config.phases)
        return [self.config.list_weights(phase) for phase in self.config.phases]

    def build_schedule(self, mixture: Mixture) -> PhaseSchedule:
        """Lay the phases over the mixture.

        Raises:
            RecipeError: The data cannot go on from `continue_from`, the text ends before a phase does, or a source is read too often.
        """
        config, position = self.config, self.data_position
        packing = build_packing(config.data, self.tokenizer)
        layout = build_layout(mixture, packing, position.start if position else 0, self.cache_dir)
        if position is not None and position.fingerprint != layout.fingerprint:
            raise self._build_position_error()
        try:
            weights = self._list_weights(mixture.stores)
            schedule = plan_phases(layout, packing, config.phases, config.training.global_batch_size, weights)
        except OutOfText as error:
            raise self.recipe.error(str(error), "phases", error.phase_index) from None
        if mixture.max_epochs is None:
            self._check_epochs(schedule)
        return schedule

    def _build_position_error(self) -> RecipeError:
        """Build the error about data that are not those of `continue_from`."""
        weights = "" if self.data_position and self.data_position.mixes else "weights, "
        message = (
            f"the data cannot go on from there: datasets, {weights}validation, seed or tokenizer differ from that run's, "
            "or the way to mix or pack"
        )
        return self.recipe.error(message, "data", "continue_from")

    def _check_epochs(self, schedule: PhaseSchedule) -> None:
        problems = []
        stores = schedule.mix.stores
        for i, (source, store, epochs) in enumerate(zip(self.config.data.datasets, stores, schedule.source_epochs, strict=True)):
            if source.max_epochs is not None and epochs > source.max_epochs + 1 / store.num_documents:
                message = (
                    f"{source.path} would be read {epochs:.2f} times, and max_epochs is {source.max_epochs:g}: "
                    "add text, lower its weight or shorten the phases"
                )
                problems.append(Problem(self.recipe.locate("data", "datasets", i, "max_epochs"), message))
        if problems:
            raise RecipeError(problems)


def _load_data_position(recipe: Recipe, inputs: Inputs) -> Position | None:
    """Read where an earlier run's data ended, for `data.continue_from`."""
    path = recipe.config.data.continue_from
    if path is None:
        return None
    result = read_json(inputs.find_run(path, "data", "continue_from").path / "result.json")
    if not isinstance(result.get("data_end"), dict):
        message = f"{path} is a {result.get('stage')} recipe and has no position in the data to go on from"
        raise recipe.error(message, "data", "continue_from")
    mixes = [Mix(mix["token"], tuple(mix["weights"])) for mix in result["data_end"].get("mixes", [])]
    return Position(**{**result["data_end"], "mixes": mixes})


def _load_or_train_tokenizer(
    config: PretrainConfig, inputs: Inputs, sources: Sequence[DataSource], cache_dir: Path, model_path: str | None
) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer or the model's, or train one."""
    settings = config.tokenizer
    if settings.family is None:
        uses_models = settings.name_or_path is None and settings.output_of is None
        path = model_path if uses_models else inputs.find_model(settings, "tokenizer")
        assert path is not None
        return load_tokenizer(path, config.model.revision if uses_models else settings.revision)
    assert settings.vocab_size is not None
    key = [settings.family, settings.vocab_size, [[describe_source(s), s.entry.weight] for s in sources]]  # type: ignore[attr-defined]
    folder = cache_dir / f"tokenizer-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
    with hold_lock(cache_dir / f"{folder.name}.lock"):
        if not folder.is_dir():
            trained = bpe_training.train_llama3((text for _, text in mix_documents(sources, None)), settings.vocab_size)
            with atomic_folder(folder, replace=False) as tmp:
                save_tokenizer(trained, tmp)
    return load_tokenizer(str(folder))
