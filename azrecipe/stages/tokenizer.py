"""Stage tokenizer: train candidates, measure them on held-out text, and choose one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.data import tokenizer_corpus
from azrecipe.data.cleaning_report import CleaningReport, explain_missing_text
from azrecipe.data.inputs import Inputs
from azrecipe.data.readers import DataSource, read_rows
from azrecipe.data.sources import hash_text, read_texts
from azrecipe.data.token_store import hash_held_out
from azrecipe.distributed.backend import Backend
from azrecipe.errors import Problem, RecipeError, SourceLocation
from azrecipe.modeling import loading
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import ParallelSource, TokenizerConfig
from azrecipe.runs.run_dir import check_run_matches, locate_run, open_run
from azrecipe.tokenization import candidates, tokenizer_metrics
from azrecipe.tokenization.encoding import hash_tokenizer
from azrecipe.tokenization.tokenizer import (
    SPLIT_RULES,
    count_embedding_rows,
    have_same_vocabulary,
    is_byte_level_bpe,
    list_added_tokens,
    load_tokenizer,
)
from azrecipe.tokenization.tokenizer_metrics import HeldOutSet, TokenCounts
from azrecipe.utils import bootstrap
from azrecipe.utils.atomic_files import atomic_folder
from azrecipe.utils.bootstrap import Resampling
from azrecipe.utils.console import print_progress
from azrecipe.utils.process_pool import WorkerPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFINITIONS = {
    "interval": f"{bootstrap.CONFIDENCE_LEVEL} % of {bootstrap.NUM_RESAMPLES:,} resamples of the held-out documents (or groups of them); null from a single one",
    "fertility": "tokens per white-space separated word, no special tokens, summed over the held-out documents",
    "bytes_per_token": "bytes of UTF-8 text per token",
    "characters_per_token": "characters (code points) per token",
    "words_in_window": "white-space separated words in data.max_length tokens",
    "strr": "share of the words of letters that are one token, by occurrence",
    "continued_words": "share of the white-space separated words that are two or more tokens, by occurrence",
    "renyi_efficiency": f"Rényi entropy (α = {tokenizer_metrics.RENYI_ALPHA}) of the tokens / log of the vocabulary's size",
    "partial_character_tokens": "share of the tokens that are only part of a character",
    "tokens_vs_baseline": "tokens / tokens of the base tokenizer on the same documents, resampled in pairs",
    "parity": "tokens of the language's sentences / tokens of their English",
    "unused_tokens": "tokens of the vocabulary that no held-out text is cut into",
    "encoding": "best of three passes over held-out text with all threads",
    "special_tokens_in_text": "special tokens spelled out in the training text: cut out, never merged",
}


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Train, compare and choose, in the main process alone."""
    if not backend.main:
        return {}
    config: TokenizerConfig = recipe.config
    run_dir = locate_run(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    base_path = inputs.find_model(config.tokenizer, "tokenizer")
    base = load_tokenizer(base_path, config.tokenizer.revision)
    _check_candidates(recipe, base, base_path)
    shape = loading.read_embedding_shape(base_path, config.tokenizer.revision)
    text = _read_text(recipe, inputs)
    check_run_matches(recipe, run_dir, inputs.fingerprints)
    run_dir.require_disk_space((len(config.candidates) + 2) * len(base.backend_tokenizer.to_str()) * 2, "writing the candidates")

    with open_run(recipe, run_dir, inputs.fingerprints):
        corpus = tokenizer_corpus.TokenizerCorpus(text.sources, config.training_bytes, text.held_out_hashes, list_added_tokens(base))
        for family in candidates.group_candidates(
            config.candidates, {name: partial(read_texts, protected.source) for name, protected in text.protected.items()}
        ):
            _train_family(base, family, corpus, run_dir.path / "candidates")
        sets = {name: HeldOutSet(texts, inputs.document_groups[name]) for name, texts in text.held_out.items()}
        table = []
        with WorkerPool() as workers:
            benchmark = TokenizerBenchmark(recipe, base, sets, text.parallel, workers)
            for name, candidate in config.candidates.items():
                folder = run_dir.path / "candidates" / name
                if candidate.kind == "baseline" and candidates.read_candidate_record(folder) is None:
                    candidates.save_candidate(folder, base, {})
                tokenizer = load_tokenizer(str(folder))
                line = {
                    "name": name,
                    "kind": candidate.kind,
                    "vocab_size": len(tokenizer),
                    **(candidates.read_candidate_record(folder) or {}),
                }
                line |= {"protect": text.protected[name].summary} if name in text.protected else {}
                line |= benchmark.measure(tokenizer) | _count_added_rows(shape, tokenizer, base)
                table.append(line)
                fertility = ", ".join(f"{key} {measure['value']:.2f}" for key, measure in line["fertility"].items())
                print_progress(f"  {name}: {line['vocab_size']:,} tokens, fertility {fertility}")

        first = next(iter(text.held_out))
        selected: str = config.select
        if selected == "lowest_fertility":
            selected = min(table, key=lambda row: row["fertility"][first]["value"])["name"]
        with atomic_folder(run_dir.final_dir) as tmp:
            shutil.copytree(run_dir.path / "candidates" / selected, tmp, dirs_exist_ok=True)
            (tmp / candidates.RECORD_FILE).unlink()
        result = {
            "stage": "tokenizer",
            "selected": selected,
            "candidates": table,
            "show_words": config.show_words,
            "window": config.data.max_length,
            "resamples": {"seed": config.seed, "count": bootstrap.NUM_RESAMPLES, "level": bootstrap.CONFIDENCE_LEVEL},
            "definitions": DEFINITIONS,
            "validation": {key: _describe_held_out(held_out_set, inputs, key) for key, held_out_set in sets.items()},
        }
        run_dir.mark_complete(result)
    return result


def _check_candidates(recipe: Recipe, base: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse candidates that this base cannot give, all at once."""
    config: TokenizerConfig = recipe.config
    is_byte_level = is_byte_level_bpe(base)
    min_size = candidates.get_min_vocab_size(base)
    problems: list[Problem] = []
    for name, candidate in config.candidates.items():
        has_split_rules = candidate.kind == "custom" and candidate.pre_tokenizer != "base"
        if candidate.kind != "baseline" and not is_byte_level and not has_split_rules:
            message = (
                f"the tokenizer of {path} is not a byte-level BPE (its model is {candidates.get_model_type(base)}): kind: extension and pre_tokenizer: base "
                f"need one. What still works: kind: baseline, and kind: custom with pre_tokenizer: {', '.join(SPLIT_RULES)}"
            )
            problems.append(Problem(recipe.locate("candidates", name), message))
        if candidate.vocab_size is not None and candidate.vocab_size < min_size:
            message = (
                f"candidates.{name}.vocab_size = {candidate.vocab_size:,} is too small: the 256 bytes and the base's "
                f"{min_size - candidates.MIN_BYTE_VOCABULARY:,} special and added tokens are part of it, so at least {min_size:,}"
            )
            problems.append(Problem(recipe.locate("candidates", name, "vocab_size"), message))
    if problems:
        raise RecipeError(problems)


@dataclass(frozen=True)
class _ProtectedText:
    """A text whose tokens a candidate keeps, and its summary."""

    source: DataSource
    summary: dict[str, Any]


@dataclass(frozen=True)
class _ParallelText:
    """Pairs of sentences (language, English), and each pair's resampling group."""

    pairs: list[tuple[str, str]]
    groups: list[str]


@dataclass(frozen=True)
class _TokenizerText:
    """All text that a recipe reads, checked.

    `held_out_hashes` are those of the held-out documents, which no tokenizer learns from.
    """

    sources: list[DataSource]
    held_out: dict[str, list[str]]
    held_out_hashes: frozenset[bytes]
    parallel: _ParallelText | None
    protected: dict[str, _ProtectedText]


def check(recipe: Recipe, inputs: Inputs) -> None:
    """Refuse what a run would refuse."""
    path = inputs.find_model(recipe.config.tokenizer, "tokenizer")
    _check_candidates(recipe, load_tokenizer(path, recipe.config.tokenizer.revision), path)
    _read_text(recipe, inputs)


def check_planned(recipe: Recipe, inputs: Inputs) -> None:
    """Refuse what shows before the base tokenizer exists: the text."""
    _read_text(recipe, inputs)


def _read_text(recipe: Recipe, inputs: Inputs) -> _TokenizerText:
    config: TokenizerConfig = recipe.config
    sources = inputs.locate_datasets(list(config.data.datasets))
    held_out = inputs.read_validation(config.data.validation)
    parallel = _load_parallel_text(recipe, inputs)
    held_out_hashes = hash_held_out(held_out)
    for source in sources:
        report = CleaningReport()
        if all(hash_text(text) in held_out_hashes for text in read_texts(source, report=report)):  # stops at the first that is not
            raise source.error(f"{source.title} holds no text that is not held out{explain_missing_text(report)}")
    return _TokenizerText(sources, held_out, held_out_hashes, parallel, _read_protected_texts(recipe, inputs, held_out_hashes))


def _read_protected_texts(recipe: Recipe, inputs: Inputs, held_out_hashes: frozenset[bytes]) -> dict[str, _ProtectedText]:
    """Read the text that each candidate protects, to refuse it now."""
    protected = {}
    for name, candidate in recipe.config.candidates.items():
        if candidate.protect is None:
            continue
        source, report = inputs.locate_source(candidate.protect, "candidates", name, "protect"), CleaningReport()
        summary: dict[str, Any] = {"source": source.title, "documents": 0, "bytes": 0, "held_out_documents": 0}
        for text in read_texts(source, report=report):
            summary["documents"] += 1
            summary["bytes"] += len(text.encode())
            summary["held_out_documents"] += hash_text(text) in held_out_hashes
        if not summary["documents"]:
            raise source.error(f"{source.title} holds no text to protect{explain_missing_text(report)}")
        protected[name] = _ProtectedText(source, summary | ({"cleaned": report.to_dict()} if source.has_report(report) else {}))
    return protected


def _load_parallel_text(recipe: Recipe, inputs: Inputs) -> _ParallelText | None:
    """Read the recipe's parallel text, up to max_pairs."""
    entry: ParallelSource | None = recipe.config.data.parallel
    if entry is None:
        return None
    source = inputs.locate_source(entry, "data", "parallel")
    pairs, groups = [], []
    for group, pair in _read_pairs(source, entry):
        pairs.append(pair)
        groups.append(group)
        if len(pairs) == entry.max_pairs:
            break
    if not pairs:
        raise source.error(f"{source.title} holds no pair of sentences")
    return _ParallelText(pairs, groups)


def _read_pairs(source: DataSource, entry: ParallelSource) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each pair's group and sentences, without empty ones."""
    for number, (location, row) in enumerate(read_rows(source)):
        sentence = _get_column(source, location, row, entry.text_column)
        english = _get_column(source, location, row, entry.english_column)
        group = _get_column(source, location, row, entry.by) if entry.by else number
        if not isinstance(sentence, str) or not isinstance(english, str):
            raise source.error(f"{location}: columns '{entry.text_column}' and '{entry.english_column}' must hold text")
        if sentence.strip() and english.strip():
            yield str(group), (sentence, english)


def _get_column(source: DataSource, location: SourceLocation, row: Any, column: str) -> Any:
    """Get a column's value, `translation.az` being az inside translation. Raises RecipeError."""
    value = _get_nested_value(row, column)
    if value is None:
        columns = [f"{key}.{inner}" for key, nested in row.items() if isinstance(nested, dict) for inner in nested]
        raise source.error(f"{location}: no column '{column}'. Columns: {', '.join(columns or row)}")
    return value


def _get_nested_value(row: Any, column: str) -> Any:
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _train_family(
    base: PreTrainedTokenizerBase, family: candidates.CandidateFamily, corpus: tokenizer_corpus.TokenizerCorpus, folder: Path
) -> None:
    """Train a family's candidates, unless an interrupted run has saved them."""
    if all(candidates.read_candidate_record(folder / name) is not None for name in family.sizes):
        return
    for name, (tokenizer, record) in candidates.train_family(base, family, corpus).items():
        candidates.save_candidate(folder / name, tokenizer, record)


@dataclass
class TokenizerBenchmark:
    """Measures every tokenizer on the same documents, resamples and baseline."""

    recipe: Recipe
    base: PreTrainedTokenizerBase
    sets: Mapping[str, HeldOutSet]
    parallel: _ParallelText | None
    workers: WorkerPool

    def __post_init__(self) -> None:
        seed = self.recipe.config.seed
        self.resamplings = {name: Resampling(held_out.groups, seed) for name, held_out in self.sets.items()}
        self.pair_resampling = Resampling(self.parallel.groups, seed) if self.parallel else None
        self.base_hash = hash_tokenizer(self.base)
        self.baseline = self._count(self.base)

    def _count(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenCounts]:
        return tokenizer_metrics.count_tokens(self.workers, tokenizer, {name: held_out.texts for name, held_out in self.sets.items()})

    def measure(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Measure one tokenizer; measures of sets are {measure: {set: {"value", "interval"}}}."""
        config: TokenizerConfig = self.recipe.config
        is_base = hash_tokenizer(tokenizer) == self.base_hash
        counts = self.baseline if is_base else self._count(tokenizer)
        by_set = {
            name: tokenizer_metrics.compute_metrics(
                counts[name], self.baseline[name], len(tokenizer), config.data.max_length, self.resamplings[name]
            )
            for name in self.sets
        }
        metrics: dict[str, Any] = {key: {name: by_set[name][key] for name in by_set} for key in next(iter(by_set.values()))}
        if self.parallel and self.pair_resampling:
            metrics["parity"] = tokenizer_metrics.compute_parity(tokenizer, self.parallel.pairs, self.pair_resampling)
        metrics["changed_documents"] = {name: int(c.changed.sum()) for name, c in counts.items()}
        metrics["unused_tokens"] = tokenizer_metrics.count_unused_tokens(tokenizer, counts)
        metrics["encoding"] = tokenizer_metrics.measure_speed(tokenizer, next(iter(self.sets.values())).texts)
        metrics["words"] = [tokenizer_metrics.split_word(tokenizer, word) for word in config.show_words]
        return metrics


def _count_added_rows(
    shape: tuple[int, int, int] | None, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase
) -> dict[str, int | None]:
    """Count the embedding rows and parameters that a vocabulary adds.

    Args:
        shape: The model's embedding rows, width and number of embedding matrices; None where its configuration is not known.
        tokenizer: The candidate.
        base: The model's tokenizer.
    """
    needed = count_embedding_rows(tokenizer)
    if shape is None:
        return {"embedding_rows_added": needed - count_embedding_rows(base), "embedding_parameters_added": None}
    rows_now, width, matrices = shape
    added = 0 if have_same_vocabulary(tokenizer, base) else needed - rows_now
    return {"embedding_rows_added": added, "embedding_parameters_added": added * width * matrices}


def _describe_held_out(held_out: HeldOutSet, inputs: Inputs, name: str) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "documents": len(held_out.texts),
        "groups": len(set(held_out.groups)),
        "bytes": sum(len(text.encode()) for text in held_out.texts),
        "words": sum(len(text.split()) for text in held_out.texts),
    }
    if name in inputs.cleaning_reports:
        summary["cleaned"] = inputs.cleaning_reports[name].to_dict()
    return summary
