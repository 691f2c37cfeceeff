"""A store whose files are not as they were written is made again, and that is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from azrecipe.data.readers import DataSource
from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
from azrecipe.errors import SourceLocation
from azrecipe.recipe.types import TextSource
from azrecipe.tokenization.tokenizer import load_tokenizer


def flip(file: Path, place: int = 9) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def forget_checksums(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    del meta["xxh3_128"]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def age_and_cut(folder: Path) -> None:
    forget_checksums(folder)
    os.truncate(folder / "tokens.bin", 8)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped token": lambda folder: flip(folder / "tokens.bin"),
    "flipped length": lambda folder: flip(folder / "documents.bin"),
    "hole": lambda folder: zero(folder / "tokens.bin"),
    "cut": lambda folder: os.truncate(folder / "tokens.bin", 8),
    "missing": lambda folder: (folder / "documents.bin").unlink(),
    "torn meta": lambda folder: (folder / "meta.json").write_text('{"title": ', encoding="utf-8"),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "ill-typed meta": lambda folder: (folder / "meta.json").write_text("[1]", encoding="utf-8"),
    "cut, without checksums": age_and_cut,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_made_again(project: Path, llama: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = DataSource(TextSource(path="text.jsonl", split="train"), SourceLocation("r.yaml", 1, 1))
    spec = TokenizeSpec(load_tokenizer(str(llama)), frozenset())
    store = load_or_tokenize(source, spec, project / "cache")
    tokens, offsets = np.array(store.tokens), store.offsets
    folder = project / "cache" / store.key
    DAMAGE[kind](folder)
    again = load_or_tokenize(source, spec, project / "cache")
    assert np.array_equal(again.tokens, tokens) and np.array_equal(again.offsets, offsets)
    assert f"{folder}: " in (said := capsys.readouterr().err) and "text.jsonl is tokenised again" in said
    load_or_tokenize(source, spec, project / "cache")
    assert "again" not in capsys.readouterr().err


def test_a_store_of_an_earlier_version_is_used(project: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = DataSource(TextSource(path="text.jsonl", split="train"), SourceLocation("r.yaml", 1, 1))
    spec = TokenizeSpec(load_tokenizer(str(llama)), frozenset())
    forget_checksums(project / "cache" / load_or_tokenize(source, spec, project / "cache").key)
    load_or_tokenize(source, spec, project / "cache")
    assert "again" not in capsys.readouterr().err
