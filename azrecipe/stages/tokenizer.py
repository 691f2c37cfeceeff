"""Stage tokenizer: train the candidates on the corpus, measure all on held-out text, write each, and the chosen one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.data import tokenizer_corpus
from azrecipe.data.cleaning_report import Tally, nothing_left
from azrecipe.data.inputs import Inputs
from azrecipe.data.readers import Located, rows
from azrecipe.data.sources import text_hash, texts
from azrecipe.data.token_store import held_out_hashes
from azrecipe.distributed.backend import Backend
from azrecipe.errors import Problem, RecipeError
from azrecipe.modeling import loading
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import ParallelSource, Tokenizer
from azrecipe.runs import run_dir
from azrecipe.tokenization import candidates, tokenizer_metrics
from azrecipe.tokenization.encoding import tokenizer_hash
from azrecipe.tokenization.tokenizer import SPLITS, added_names, is_byte_level_bpe, load_tokenizer, rows_needed, same_vocabulary
from azrecipe.tokenization.tokenizer_metrics import Counts, Held
from azrecipe.utils import bootstrap
from azrecipe.utils.atomic_files import whole_folder
from azrecipe.utils.bootstrap import Resampling
from azrecipe.utils.console import say
from azrecipe.utils.process_pool import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFINITIONS = {
    "interval": f"{bootstrap.LEVEL} % of {bootstrap.RESAMPLES:,} resamples of the held-out documents (or groups of them); null from a single one",
    "fertility": "tokens per white-space separated word, no special tokens, summed over the held-out documents",
    "bytes_per_token": "bytes of UTF-8 text per token",
    "characters_per_token": "characters (code points) per token",
    "words_in_window": "white-space separated words in data.max_length tokens",
    "strr": "share of the words of letters that are one token, by occurrence",
    "continued_words": "share of the white-space separated words that are two or more tokens, by occurrence",
    "renyi_efficiency": f"Rényi entropy (α = {tokenizer_metrics.ALPHA}) of the tokens / log of the vocabulary's size",
    "partial_character_tokens": "share of the tokens that are only part of a character",
    "tokens_vs_baseline": "tokens / tokens of the base tokenizer on the same documents, resampled in pairs",
    "parity": "tokens of the language's sentences / tokens of their English",
    "unused_tokens": "tokens of the vocabulary that no held-out text is cut into",
    "encoding": "best of three passes over held-out text with all threads",
    "special_tokens_in_text": "special tokens spelled out in the training text: cut out, never merged",
}


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Train, compare, choose. One process does it all; the others of a distributed launch have nothing to do."""
    if not backend.main:
        return {}
    config: Tokenizer = recipe.config
    place = run_dir.locate(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    base_path = inputs.folder(config.tokenizer, "tokenizer")
    sources = inputs.datasets(list(config.data.datasets))
    held_out = inputs.validation(config.data.validation)
    base = load_tokenizer(base_path, config.tokenizer.revision)
    _check_candidates(recipe, base, base_path)
    shape = loading.embedding_shape(base_path, config.tokenizer.revision)
    pairs = _pairs(recipe, inputs)
    known = held_out_hashes(held_out)
    for source in sources:
        tally = Tally()
        if all(text_hash(text) in known for text in texts(source, tally=tally)):  # stops at the first that is not
            raise source.wrong(f"{source.title} holds no text that is not held out{nothing_left(tally)}")
    protected = _protected(recipe, inputs, known)
    run_dir.check_same(recipe, place, inputs.found)
    place.need((len(config.candidates) + 2) * len(base.backend_tokenizer.to_str()) * 2, "writing the candidates")

    with run_dir.opened(recipe, place, inputs.found):
        text = tokenizer_corpus.Text(sources, config.training_bytes, known, added_names(base))
        for family in candidates.families(config.candidates, {name: partial(texts, located) for name, (located, _) in protected.items()}):
            _train(base, family, text, place.path / "candidates")
        sets = {name: Held(texts, inputs.groups[name]) for name, texts in held_out.items()}
        table = []
        with Workers() as workers:
            laboratory = Laboratory(recipe, base, sets, pairs, workers)
            for name, candidate in config.candidates.items():
                folder = place.path / "candidates" / name
                if candidate.kind == "baseline" and candidates.saved(folder) is None:
                    candidates.save(folder, base, {})
                tokenizer = load_tokenizer(str(folder))
                line = {"name": name, "kind": candidate.kind, "vocab_size": len(tokenizer), **(candidates.saved(folder) or {})}
                line |= {"protect": protected[name][1]} if name in protected else {}
                line |= laboratory.measure(tokenizer) | _rows_added(shape, tokenizer, base)
                table.append(line)
                found = ", ".join(f"{key} {measure['value']:.2f}" for key, measure in line["fertility"].items())
                say(f"  {name}: {line['vocab_size']:,} tokens, fertility {found}")

        first = next(iter(held_out))
        chosen: str = config.select
        if chosen == "lowest_fertility":
            chosen = min(table, key=lambda row: row["fertility"][first]["value"])["name"]
        with whole_folder(place.final) as aside:
            shutil.copytree(place.path / "candidates" / chosen, aside, dirs_exist_ok=True)
            (aside / candidates.RECORD).unlink()
        result = {
            "stage": "tokenizer",
            "selected": chosen,
            "candidates": table,
            "show_words": config.show_words,
            "window": config.data.max_length,
            "resamples": {"seed": config.seed, "count": bootstrap.RESAMPLES, "level": bootstrap.LEVEL},
            "definitions": DEFINITIONS,
            "validation": {key: _size(held, inputs, key) for key, held in sets.items()},
        }
        place.finish(result)
    return result


def _check_candidates(recipe: Recipe, base: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse, all at once, candidates that this base cannot give."""
    config: Tokenizer = recipe.config
    native = is_byte_level_bpe(base)
    least = candidates.least_size(base)
    problems: list[Problem] = []
    for name, candidate in config.candidates.items():
        own_rules = candidate.kind == "custom" and candidate.pre_tokenizer != "base"
        if candidate.kind != "baseline" and not native and not own_rules:
            message = (
                f"the tokenizer of {path} is not a byte-level BPE (its model is {candidates.describe(base)}): kind: extension and pre_tokenizer: base "
                f"need one. What still works: kind: baseline, and kind: custom with pre_tokenizer: {', '.join(SPLITS)}"
            )
            problems.append(Problem(recipe.place("candidates", name), message))
        if candidate.vocab_size is not None and candidate.vocab_size < least:
            message = (
                f"candidates.{name}.vocab_size = {candidate.vocab_size:,} is too small: the 256 bytes and the base's "
                f"{least - candidates.LEAST_CORPUS:,} special and added tokens stand in it too, so at least {least:,}"
            )
            problems.append(Problem(recipe.place("candidates", name, "vocab_size"), message))
    if problems:
        raise RecipeError(problems)


def _protected(recipe: Recipe, inputs: Inputs, known: frozenset[bytes]) -> dict[str, tuple[Located, dict[str, Any]]]:
    """The text that a candidate protects, gone through once so that nothing in it is refused later, and what it holds."""
    found: dict[str, tuple[Located, dict[str, Any]]] = {}
    for name, candidate in recipe.config.candidates.items():
        if candidate.protect is None:
            continue
        located, tally = inputs.located(candidate.protect, "candidates", name, "protect"), Tally()
        told: dict[str, Any] = {"source": located.title, "documents": 0, "bytes": 0, "held_out_documents": 0}
        for text in texts(located, tally=tally):
            told["documents"] += 1
            told["bytes"] += len(text.encode())
            told["held_out_documents"] += text_hash(text) in known
        if not told["documents"]:
            raise located.wrong(f"{located.title} holds no text to protect{nothing_left(tally)}")
        found[name] = (located, told | ({"cleaned": tally.report()} if located.cleaned else {}))
    return found


def _pairs(recipe: Recipe, inputs: Inputs) -> tuple[list[tuple[str, str]], list[str]] | None:
    """The parallel text (language, English) and the group of each pair."""
    source: ParallelSource | None = recipe.config.data.parallel
    if source is None:
        return None
    located = inputs.located(source, "data", "parallel")
    pairs, groups = [], []
    for group, pair in _read_pairs(located, source):
        pairs.append(pair)
        groups.append(group)
        if len(pairs) == source.max_pairs:
            break
    if not pairs:
        raise located.wrong(f"{located.title} holds no pair of sentences")
    return pairs, groups


def _read_pairs(located: Located, source: ParallelSource) -> Iterator[tuple[str, tuple[str, str]]]:
    columns = [source.text_column, source.english_column, *([source.by] if source.by else [])]
    for number, (where, row) in enumerate(rows(located)):
        found = []
        for column in columns:
            value = _inside(row, column)
            if value is None:
                known = [f"{key}.{inner}" for key, below in row.items() if isinstance(below, dict) for inner in below]
                raise located.wrong(f"{where}: no column '{column}'. Columns: {', '.join(known or row)}")
            found.append(value)
        ours, english = found[:2]
        if not isinstance(ours, str) or not isinstance(english, str):
            raise located.wrong(f"{where}: columns '{source.text_column}' and '{source.english_column}' must hold text")
        if ours.strip() and english.strip():
            yield str(found[2] if source.by else number), (ours, english)


def _inside(row: Any, column: str) -> Any:
    """A column's value; `translation.az` is az inside translation."""
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _train(base: PreTrainedTokenizerBase, family: candidates.Family, text: tokenizer_corpus.Text, folder: Path) -> None:
    """Make a family's candidates; those that an interrupted run has saved are not made again."""
    if all(candidates.saved(folder / name) is not None for name in family.sizes):
        return
    for name, (tokenizer, told) in candidates.make(base, family, text).items():
        candidates.save(folder / name, tokenizer, told)


@dataclass
class Laboratory:
    """What every tokenizer is measured on and against: the same documents, the same resamples, the same baseline."""

    recipe: Recipe
    base: PreTrainedTokenizerBase
    sets: Mapping[str, Held]
    pairs: tuple[list[tuple[str, str]], list[str]] | None
    workers: Workers

    def __post_init__(self) -> None:
        seed = self.recipe.config.seed
        self.resamplings = {name: Resampling(held.groups, seed) for name, held in self.sets.items()}
        self.pair_resampling = Resampling(self.pairs[1], seed) if self.pairs else None
        self.base_hash = tokenizer_hash(self.base)
        self.baseline = self._count(self.base)

    def _count(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Counts]:
        return tokenizer_metrics.count(self.workers, tokenizer, {name: held.texts for name, held in self.sets.items()})

    def measure(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """All measures of one tokenizer, those of sets as {measure: {set: {"value", "interval"}}}."""
        config: Tokenizer = self.recipe.config
        same = tokenizer_hash(tokenizer) == self.base_hash
        counts = self.baseline if same else self._count(tokenizer)
        by_set = {
            name: tokenizer_metrics.measures(
                counts[name], self.baseline[name], len(tokenizer), config.data.max_length, self.resamplings[name]
            )
            for name in self.sets
        }
        found: dict[str, Any] = {key: {name: by_set[name][key] for name in by_set} for key in next(iter(by_set.values()))}
        if self.pairs and self.pair_resampling:
            found["parity"] = tokenizer_metrics.parity(tokenizer, self.pairs[0], self.pair_resampling)
        found["changed_documents"] = {name: int(c.changed.sum()) for name, c in counts.items()}
        found["unused_tokens"] = tokenizer_metrics.never_used(tokenizer, counts)
        found["encoding"] = tokenizer_metrics.speed(tokenizer, next(iter(self.sets.values())).texts)
        found["words"] = [tokenizer_metrics.cut(tokenizer, word) for word in config.show_words]
        return found


def _rows_added(
    shape: tuple[int, int, int] | None, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase
) -> dict[str, int | None]:
    """What the vocabulary costs the model: rows of its embeddings against now, and parameters where its configuration is known."""
    needed = rows_needed(tokenizer)
    if shape is None:
        return {"embedding_rows_added": needed - rows_needed(base), "embedding_parameters_added": None}
    rows_now, width, matrices = shape
    added = 0 if same_vocabulary(tokenizer, base) else needed - rows_now
    return {"embedding_rows_added": added, "embedding_parameters_added": added * width * matrices}


def _size(held: Held, inputs: Inputs, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "documents": len(held.texts),
        "groups": len(set(held.groups)),
        "bytes": sum(len(text.encode()) for text in held.texts),
        "words": sum(len(text.split()) for text in held.texts),
    }
    if name in inputs.tallies:
        found["cleaned"] = inputs.tallies[name].report()
    return found
