"""`azrecipe prepare`: what it fills is what the run reads, from whatever kind of source; and what is left out is said."""

from __future__ import annotations

import gzip
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from azrecipe.data import readers, tokenized_cache
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import describe_source, read_texts
from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
from azrecipe.errors import RecipeError, SourceLocation
from azrecipe.recipe.types import Deduplication, TextSource
from azrecipe.tokenization.tokenizer import load_tokenizer
from tests import aws
from tests.conftest import TALES, Done, jsonl, write
from tests.small import Started, in_small_disk

DATA = """
stage: pretrain
project: p
model: {{config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 128}}}}
tokenizer: {{name_or_path: {llama}}}
data:
  max_length: 32
  datasets: [{{path: text.jsonl, filters: {{min_characters: 20, repetition: true}}}}, {{path: more.jsonl}}]
  validation: {{target: {{path: held.jsonl, normalize: [invisible]}}}}
  deduplication: {{method: minhash}}
phases: [{{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 2}}]
training: {{global_batch_size: 2, per_device_train_batch_size: 2, precision: float32}}
"""


def words(seed: int, count: int = 60) -> str:
    """Text without repetition, other for each seed."""
    random = np.random.Generator(np.random.PCG64(seed))
    return " ".join("".join(random.choice(list("abcdefghij"), 5)) for _ in range(count))


@pytest.fixture
def job(tmp_path: Path, llama: Path) -> Path:
    first, second, held = words(1), words(2), words(3)
    write(
        tmp_path / "text.jsonl", jsonl(*({"text": t} for t in (first, second, "short", "spam eggs " * 50, held, words(4), f"{held} more")))
    )
    write(tmp_path / "more.jsonl", jsonl({"text": first}, {"text": f"{second} tail"}, {"text": words(5)}))
    write(tmp_path / "held.jsonl", jsonl({"text": held[:10] + "\u200b" + held[10:]}, {"text": held}))
    write(tmp_path / "r.yaml", DATA.format(llama=llama))
    return tmp_path


def test_a_run_after_prepare_tokenises_nothing_and_both_say_what_was_left_out(job: Path, run_cli: Callable[..., Done]) -> None:
    done = run_cli("prepare", "r.yaml")
    assert done.code == 0, done.text
    assert "1 held out, 1 min_characters, 1 repetition, 1 near held-out ones" in done.out
    assert "1 duplicates, 1 near duplicates" in done.out
    assert "longest" in done.out and "131,072" in done.out and "sequences" in done.out
    assert not (job / "runs" / "p").exists()
    cache = job / "runs" / ".cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert len([path for path in before if path.name == "tokens.bin"]) == 2
    done = run_cli("run", "r.yaml")
    assert done.code == 0, done.text
    assert "tokenising" not in done.text
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"} == before
    text, more = json.loads((job / "runs/p/r/result.json").read_text())["data"]
    assert (text["documents"], text["held_out_left_out"], more["documents"]) == (3, 1, 1)
    assert text["cleaned"]["filtered"] == {"min_characters": 1, "repetition": 1}
    assert text["cleaned"]["samples"]["min_characters"] == [{"text": "short", "characters": 5}]
    assert text["duplicates"]["near_held_out"] == 1
    assert (more["duplicates"]["exact"], more["duplicates"]["near"]) == (1, 1)
    assert more["duplicates"]["samples"][0] == {"document": 0, "repeats": {"source": 0, "document": 0}}


def test_a_tokenizer_that_is_not_there_yet_and_what_cannot_be_prepared(
    job: Path, cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job)
    recipe = (job / "r.yaml").read_text()
    write("next.yaml", re.sub("tokenizer: .*", "tokenizer: {output_of: other.yaml}", recipe))
    write("other.yaml", recipe)
    write("pipeline.yaml", "stage: pipeline\nproject: p\nsteps: [other.yaml, next.yaml]\n")
    done = cli("prepare", "next.yaml")
    assert done.code == 2
    assert "next.yaml:5:24: " in done.err and "other.yaml" in done.err
    done = cli("prepare", "pipeline.yaml")
    assert done.code == 0, done.text
    assert "next.yaml: not prepared: it takes from other.yaml, which has no finished run yet" in done.err
    assert "other.yaml: text" in done.out
    write(
        "e.yaml",
        "stage: evaluate\nproject: p\nmodels: {a: {name_or_path: ./m}}\ndata: {max_length: 32, validation: {t: {path: held.jsonl}}}\n",
    )
    done = cli("prepare", "e.yaml")
    assert (done.code, "an evaluate recipe" in done.err, "pretrain recipes" in done.err) == (2, True, True)


def located(path: Path | str, **keys: Any) -> DataSource:
    return DataSource(TextSource(path=str(path), split="train", **keys), SourceLocation("r.yaml", 1, 1))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Some 0.6 MB."""
    rows = ({"text": f"{TALES[n % 4]}{n} {words(n, 20)} " * 8, "n": n} for n in range(350))
    return write(tmp_path / "large.jsonl", jsonl(*rows))


def test_a_store_is_the_same_however_many_processes_make_it(
    large: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = TokenizeSpec(load_tokenizer(str(llama)), frozenset(), Deduplication("minhash", 0.8, 3, 32))
    source = located(large, max_bytes=300_000)
    made = []
    for alone in (10**9, 0):
        monkeypatch.setattr(tokenized_cache, "MIN_POOL_CHARACTERS", alone)
        monkeypatch.setattr(readers, "PIECE_BYTES", 40_000)
        folder = tmp_path / f"cache{alone}"
        found = load_or_tokenize(source, making, folder)
        made.append({file.name: file.read_bytes() for file in (folder / found.key).iterdir()})
    assert made[0] == made[1]
    assert 300_000 <= found.num_bytes < 303_000
    backend = making.tokenizer.backend_tokenizer
    kept = list(read_texts(source))
    assert len(kept) == found.num_documents
    for n in (0, 17, found.num_documents - 1):
        assert found.read_document(n).tolist() == backend.encode(kept[n], add_special_tokens=False).ids


SCRIPT = """
import sys
from pathlib import Path
from azrecipe.errors import SourceLocation
from azrecipe.data import readers
from azrecipe.data import tokenized_cache
from azrecipe.data.readers import DataSource
from azrecipe.tokenization.tokenizer import load_tokenizer
from azrecipe.recipe.types import TextSource

if __name__ == "__main__":
    tokenized_cache.COMMIT_SECONDS, tokenized_cache.MIN_POOL_CHARACTERS, readers.PIECE_BYTES = 0.0, int(sys.argv[4]), 40_000
    spec = tokenized_cache.TokenizeSpec(load_tokenizer(sys.argv[2]), frozenset())
    source = DataSource(TextSource(sys.argv[1], "train"), SourceLocation("r.yaml"))
    print(tokenized_cache.load_or_tokenize(source, spec, Path(sys.argv[3])).key)
"""


def test_kill_9_while_text_is_tokenised_costs_no_work_and_changes_nothing(large: Path, llama: Path, tmp_path: Path) -> None:
    script = write(tmp_path / "make.py", SCRIPT)
    line = [sys.executable, str(script), str(large), str(llama), str(tmp_path / "cache"), "100000000"]
    partial = ".*.partial"
    for wanted in (1, 4):  # two kills, each after so many pieces
        process = Started(line, tmp_path)
        while process.poll() is None:
            states = list((tmp_path / "cache").glob(f"{partial}/state.json")) if (tmp_path / "cache").exists() else []
            if states and json.loads(states[0].read_text())["pieces"] >= wanted:
                break
            time.sleep(0.001)
        process.send(signal.SIGKILL)
        process.wait()
        states = list((tmp_path / "cache").glob(f"{partial}/state.json"))
        assert states, "it had ended before it was killed"
        with (states[0].parent / "tokens.bin").open("ab") as torn:
            torn.write(b"torn")
    two = [Started(line, tmp_path, out=tmp_path / f"out{n}", err=tmp_path / f"err{n}") for n in range(2)]
    codes = [process.wait(200) for process in two]
    errs, keys = ([(tmp_path / f"{kind}{n}").read_text() for n in range(2)] for kind in ("err", "out"))
    assert codes == [0, 0], errs
    assert sum("continuing after" in err for err in errs) == 1
    key = keys[0].strip()
    assert key == keys[1].strip()
    whole = load_or_tokenize(located(large), TokenizeSpec(load_tokenizer(str(llama)), frozenset()), tmp_path / "anew")
    assert whole.key == key
    for name in ("tokens.bin", "documents.bin"):
        assert (tmp_path / "cache" / key / name).read_bytes() == (tmp_path / "anew" / key / name).read_bytes()
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_full_disk_is_told_without_a_word_of_checkpoints(large: Path, llama: Path, tmp_path: Path) -> None:
    script = write(tmp_path / "make.py", SCRIPT)
    done = in_small_disk([sys.executable, str(script), str(large), str(llama), "disk/cache", "100000000"], tmp_path, "disk", 300_000)
    assert "CannotRun: the disk is full: no space in" in done.err
    assert "checkpoint" not in done.err


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket of a real S3 service on loopback, as pyarrow writes it."""
    from pyarrow import fs

    with aws.loopback(tmp_path_factory.mktemp("s3")) as address:
        s3 = fs.S3FileSystem(endpoint_override=address, allow_bucket_creation=True, allow_delayed_open=True)
        s3.create_dir("bucket")
        yield s3


def test_files_on_s3_are_read_as_local_ones(bucket: Any, tmp_path: Path, llama: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    wanted = [f"sənəd {n}" for n in range(900)]
    parts = [jsonl(*({"text": text} for text in wanted[a : a + 300])).encode() for a in (0, 300, 600)]
    two = pyarrow.compress(parts[2][:5001], codec="zstd", asbytes=True) + pyarrow.compress(parts[2][5001:], codec="zstd", asbytes=True)
    for name, data in {"t/a.jsonl": parts[0], "t/b.jsonl.gz": gzip.compress(parts[1]), "t/in/c.jsonl.zst": two, "t/note.md": b"no"}.items():
        with bucket.open_output_stream(f"bucket/{name}", compression=None) as out:
            out.write(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": wanted, "n": range(900)}), "bucket/p/all.parquet", filesystem=bucket)
    for path in ("s3://bucket/t/", "s3://bucket/t", "s3://bucket/**/*.jsonl*", "s3://bucket/p/*.parquet"):
        assert list(read_texts(located(path))) == wanted, path
    assert list(read_texts(located("s3://bucket/t/*.jsonl*"))) == wanted[:600]
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: no such file on S3: s3://bucket/none.jsonl"):
        list(read_texts(located("s3://bucket/none.jsonl")))
    with pytest.raises(RecipeError, match=r"no such file on S3: s3://other/"):
        list(read_texts(located("s3://other/")))
    with pytest.raises(RecipeError, match=r"s3://bucket/t/\*.txt: no file there ends in"):
        list(read_texts(located("s3://bucket/t/*.txt")))
    [origin] = describe_source(located("s3://bucket/t/a.jsonl"))["origin"]
    assert origin.startswith(f"s3://bucket/t/a.jsonl {len(parts[0])} ")


def test_s3_that_cannot_be_reached_is_told_with_the_place(
    tmp_path: Path, run_cli: Callable[..., Done], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "held.jsonl", jsonl({"text": words(1)}))
    write(tmp_path / "more.jsonl", jsonl({"text": words(2)}))
    write(tmp_path / "r.yaml", DATA.format(llama=llama).replace("text.jsonl", "s3://bucket/text.jsonl"))
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    done = run_cli("prepare", "r.yaml")
    assert done.code == 3, done.text
    assert "r.yaml:8:21: S3 cannot be reached for s3://bucket/text.jsonl" in done.err
    assert "Traceback" not in done.text
