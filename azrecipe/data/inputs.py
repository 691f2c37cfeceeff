"""Find the models, tokenizers and texts of a recipe, and fingerprint them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from azrecipe.data.cleaning_report import CleaningReport, explain_missing_text
from azrecipe.data.readers import DataSource, list_files
from azrecipe.data.sources import announce_long_documents, read_documents
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import format_key_path
from azrecipe.recipe.types import ModelSource, PretrainTokenizer, Source, ValidationSource
from azrecipe.recipe.yaml_tree import Key
from azrecipe.runs.run_dir import RunDir, find_candidate_folder, find_upstream_run
from azrecipe.utils.output_checksums import check_output_files


class Inputs:
    """The inputs of a run; a later resume compares their fingerprints.

    Attributes:
        fingerprints: A fingerprint of each input that was found so far, by its key in the recipe.
        document_groups: The group of each held-out document, by validation set.
        cleaning_reports: What the clean-up of each validation set did.
        raw_hashes: Hashes of the held-out documents before their clean-up.
    """

    def __init__(self, recipe: Recipe, runs_dir: Path) -> None:
        self.recipe, self.runs_dir = recipe, runs_dir
        self.fingerprints: dict[str, str] = {}
        self.document_groups: dict[str, list[str]] = {}
        self.cleaning_reports: dict[str, CleaningReport] = {}
        self.raw_hashes: set[bytes] = set()

    def find_run(self, output_of: str, *keys: Key) -> RunDir:
        """Find the complete run behind an `output_of`.

        Raises:
            RecipeError: There is none; the error has the location of the key.
        """
        run = find_upstream_run(self.recipe, self.runs_dir, output_of, *keys)
        self.fingerprints[f"run of {Path(output_of).name}"] = str(run.status.get("run_id"))
        return run

    def find_model(self, source: ModelSource, *keys: Key) -> str:
        """Find a model or tokenizer.

        It is the final/ or a candidate of a run, a folder, or a hub id. Raises CannotRun where a file of a run's was damaged.
        """
        if source.output_of is not None:
            run = self.find_run(source.output_of, *keys, "output_of")
            candidate = source.candidate if isinstance(source, PretrainTokenizer) else None
            folder = run.final_dir if candidate is None else find_candidate_folder(self.recipe, run, candidate, *keys, "candidate")
            check_output_files(folder, with_weights=False)  # weights: when they are loaded
            return str(folder)
        assert source.name_or_path is not None
        return source.name_or_path

    def locate_source(self, source: Source, *keys: Key) -> DataSource:
        """Locate a dataset entry in the recipe, and fingerprint its files."""
        located = DataSource(source, self.recipe.locate(*keys, "path"))
        if located.in_files:
            content = [[file.base_name, file.content_id] for file in list_files(located)]
            self.fingerprints[format_key_path(keys)] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return located

    def locate_datasets(self, sources: list[Source]) -> list[DataSource]:
        """Locate the entries of data.datasets."""
        return [self.locate_source(source, "data", "datasets", i) for i, source in enumerate(sources)]

    def read_validation(self, sources: Mapping[str, ValidationSource]) -> dict[str, list[str]]:
        """Read the held-out documents of each validation set into memory.

        Fills `document_groups`, `raw_hashes` and, for the sets of which documents may be dropped, `cleaning_reports`.

        Raises:
            RecipeError: A set holds no text.
        """
        texts = {}
        for name, source in sources.items():
            located = self.locate_source(source, "data", "validation", name)
            report = CleaningReport()
            held_out = list(read_documents(located, held_out_side=True, report=report))
            if not held_out:
                raise located.error(f"validation set '{name}': {located.title} holds no text{explain_missing_text(report)}")
            texts[name], self.document_groups[name] = [document.text for document in held_out], [document.group for document in held_out]
            self.raw_hashes.update(document.raw_hash for document in held_out)
            announce_long_documents(located, report)
            if located.has_report(report):
                self.cleaning_reports[name] = report
        return texts
