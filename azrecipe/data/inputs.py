"""From a recipe to open things: where its tokenizers and models stand, its texts, and the hashes that name its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from azrecipe.data.cleaning_report import Tally, nothing_left
from azrecipe.data.readers import Located, files
from azrecipe.data.sources import documents
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import dotted
from azrecipe.recipe.types import ModelSource, PretrainTokenizer, Source, ValidationSource
from azrecipe.recipe.yaml_tree import Key
from azrecipe.runs.run_dir import RunDir, candidate_of, upstream


class Inputs:
    """Collects what a run takes from elsewhere, so that a later resume can tell whether it has changed."""

    def __init__(self, recipe: Recipe, runs_dir: Path) -> None:
        self.recipe, self.runs_dir = recipe, runs_dir
        self.found: dict[str, str] = {}
        self.groups: dict[str, list[str]] = {}
        self.tallies: dict[str, Tally] = {}
        self.came: set[bytes] = set()

    def run_of(self, output_of: str, *keys: Key) -> RunDir:
        """The complete run behind an `output_of`. Raises RecipeError at its place."""
        run = upstream(self.recipe, self.runs_dir, output_of, *keys)
        self.found[f"run of {Path(output_of).name}"] = str(run.status.get("run_id"))
        return run

    def folder(self, source: ModelSource, *keys: Key) -> str:
        """Where a model or tokenizer is: the final/ of a run, or the candidate asked for, a folder, or a hub id."""
        if source.output_of is not None:
            run = self.run_of(source.output_of, *keys, "output_of")
            if isinstance(source, PretrainTokenizer) and source.candidate is not None:
                return str(candidate_of(self.recipe, run, source.candidate, *keys, "candidate"))
            return str(run.final)
        assert source.name_or_path is not None
        return source.name_or_path

    def located(self, source: Source, *keys: Key) -> Located:
        """A dataset with its place in the recipe; local files are hashed, those on S3 known by size and time of change."""
        found = Located(source, self.recipe.place(*keys, "path"))
        if found.in_files:
            content = [[file.name, file.version] for file in files(found)]
            self.found[dotted(keys)] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return found

    def datasets(self, sources: list[Source]) -> list[Located]:
        """The recipe's data.datasets."""
        return [self.located(source, "data", "datasets", i) for i, source in enumerate(sources)]

    def validation(self, sources: Mapping[str, ValidationSource]) -> dict[str, list[str]]:
        """The held-out documents of each validation set, read into memory. Raises RecipeError for a set without text.

        Fills `groups` (what each document belongs together with), `came` (their hashes before any clean-up) and, for the
        sets that are cleaned, `tallies`.
        """
        found = {}
        for name, source in sources.items():
            located = self.located(source, "data", "validation", name)
            tally = Tally()
            read = list(documents(located, held_out_side=True, tally=tally))
            if not read:
                raise located.wrong(f"validation set '{name}': {located.title} holds no text{nothing_left(tally)}")
            found[name], self.groups[name] = [document.text for document in read], [document.group for document in read]
            self.came.update(document.came for document in read)
            if located.cleaned:
                self.tallies[name] = tally
        return found
