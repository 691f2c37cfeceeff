"""The space between the vocabularies: what is read, what comes out where the answer is known, and that it comes out again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from azrecipe.data.mixture import Mixture
from azrecipe.data.token_store import TokenStore
from azrecipe.errors import CannotRun
from azrecipe.modeling import word_vectors
from azrecipe.modeling.word_vectors import MixtureText, compose_embeddings
from azrecipe.pipeline import preflight
from azrecipe.recipe import extras
from azrecipe.recipe.extras import check_word_vectors
from azrecipe.recipe.load import load_recipe
from tests.conftest import ROOT, write
from tests.small import fill

TOPICS, COMMON = 12, 4  # each topic: a token that both vocabularies hold (0-11), a new one (12-23), and words of its own


def store(documents: list[list[int]], key: str = "a") -> TokenStore:
    offsets = np.cumsum([0, *map(len, documents)])
    tokens = np.concatenate([np.asarray(d, dtype=np.uint32) for d in documents])
    return TokenStore(key, tokens, offsets, np.asarray([3 * len(d) for d in documents]), 0)


def planted(seed: int = 0) -> Mixture:
    """Text in which a topic's new token stands where its old one could: (its words) (old or new) (its words)."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(3000):
        topic = int(generator.integers(TOPICS))
        words = 2 * TOPICS + COMMON * topic + generator.integers(COMMON, size=40)
        words[::5] = topic + TOPICS * generator.integers(2, size=8)
        documents.append(words.tolist())
    documents[7].append(900)  # a token too rare to have a vector
    return Mixture([store(documents)], [1.0], seed=3, specials_per_document=2)


SAME = {new: new + 1000 for new in range(2 * TOPICS + COMMON * TOPICS) if not TOPICS <= new < 2 * TOPICS} | {900: 2000}


@pytest.mark.parametrize("method", extras.WORD_VECTOR_METHODS)
def test_a_token_that_is_used_like_an_old_one_becomes_that_one(method: str, tmp_path: Path) -> None:
    composed = compose_embeddings(planted(), tmp_path, method, SAME)
    assert composed.tokens.tolist() == list(range(TOPICS, 2 * TOPICS))
    weights = composed.combinations.apply(torch.eye(2100))
    by_topic = torch.zeros(TOPICS, TOPICS)  # the topic's own words are used much alike, so a pursuit may pick those too
    for n in range(TOPICS):
        words = 1000 + 2 * TOPICS + COMMON * n
        by_topic[:, n] = weights[:, 1000 + n] + weights[:, words : words + COMMON].sum(1)
    assert torch.equal(by_topic.argmax(1), torch.arange(TOPICS))
    assert (by_topic.diagonal() > 0.6).all()
    if method == "focus":
        assert torch.equal(weights.argmax(1), 1000 + torch.arange(TOPICS))
        assert (weights.diagonal(1000) > 0.5).all()
        assert (weights >= 0).all()
        assert torch.allclose(weights.sum(1), torch.ones(TOPICS), atol=1e-5)


def test_what_was_found_is_kept_and_the_vectors_serve_both_methods(tmp_path: Path) -> None:
    first = compose_embeddings(planted(), tmp_path, "focus", SAME)
    vectors = next(tmp_path.glob("vectors-*"))
    made = vectors.stat().st_mtime_ns
    compose_embeddings(planted(), tmp_path, "omp", SAME)
    again = compose_embeddings(planted(), tmp_path, "focus", SAME)
    assert vectors.stat().st_mtime_ns == made
    assert len(list(tmp_path.glob("sums-*[0-9a-f]"))) == 2
    assert torch.equal(first.combinations.weights, again.combinations.weights)
    compose_embeddings(planted(seed=1), tmp_path, "focus", {**SAME, 13: 1013})
    assert len(list(tmp_path.glob("vectors-*[0-9a-f]"))) == 1  # the same names of data: other pairs, the same text
    assert len(list(tmp_path.glob("sums-*[0-9a-f]"))) == 3


@pytest.mark.long
def test_processes_that_hash_strings_differently_find_the_same(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from azrecipe.modeling.word_vectors import compose_embeddings
from tests.unit.modeling.test_word_vectors import SAME, planted
for method in ("focus", "omp"):
    compose_embeddings(planted(), Path(sys.argv[1]), method, SAME)
print(hash("azrecipe"))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], env=environment, check=True, cwd=ROOT, capture_output=True)
    assert int(other.stdout.split()[-1]) != hash("azrecipe")
    for method in ("focus", "omp"):
        compose_embeddings(planted(), tmp_path / "2", method, SAME)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.npy"))
    assert len(files) == 2 + 4 + 4
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def test_nothing_shared_and_nothing_frequent_compose_nothing(tmp_path: Path) -> None:
    assert len(compose_embeddings(planted(), tmp_path, "focus", {}).tokens) == 0
    rare = Mixture([store([[1, 2, 3], [4, 5]], key="rare")], [1.0], seed=1, specials_per_document=0)
    composed = compose_embeddings(rare, tmp_path, "omp", {1: 1})
    assert len(composed.tokens) == 0
    assert composed.combinations.apply(torch.eye(4)).shape == (0, 4)


def test_the_text_is_the_beginning_of_the_mix_in_its_order_and_no_long_document_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_vectors, "MAX_SENTENCE_TOKENS", 7)
    first, second = store([[i] * 10 for i in range(50)], "a"), store([[100 + i] * 10 for i in range(50)], "b")
    mix = Mixture([first, second], [3.0, 1.0], seed=5, specials_per_document=2)
    text = MixtureText(mix, max_tokens=240)
    order = mix.build_order(tokens=240)
    wanted = [mix.stores[s].tokens[mix.stores[s].offsets[d]] for s, d in zip(order.source[:20], order.document[:20], strict=True)]
    parts = list(text)
    assert [len(part) for part in parts] == [7, 3] * 20
    assert [int(part[0]) for part in parts[::2]] == wanted
    assert text.token_counts.sum() == 200
    assert sum(1 for i in wanted if i < 100) == 15
    assert MixtureText(mix, max_tokens=10**9).token_counts.sum() == 1000  # once over all sources, not again and again


def test_without_gensim_the_methods_that_need_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_word_vectors("focus")
    monkeypatch.setitem(sys.modules, "gensim", None)
    check_word_vectors("subtoken_mean")
    with pytest.raises(CannotRun, match=r"omp needs gensim: pip install 'azrecipe\[focus\]'"):
        check_word_vectors("omp")


def test_that_is_told_before_any_process_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    recipe = load_recipe(write(tmp_path / "focus.yaml", "stage: pretrain\nextends: cpt.yaml\ntokenizer: {new_embeddings: focus}\n"))
    launch = preflight.read_launch_config(None, None)
    preflight.check_launch([recipe], launch)
    monkeypatch.setitem(sys.modules, "gensim", None)
    with pytest.raises(CannotRun, match=r"focus.yaml: .*focus needs gensim"):
        preflight.check_launch([recipe], launch)
