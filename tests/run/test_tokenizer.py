"""The tokenizer stage as a user runs it: every candidate measured and saved, a page to look at, nothing lost to a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import Done, jsonl, write
from tests.small import Project, pages

PER_SET = ("fertility", "bytes_per_token", "characters_per_token", "words_in_window", "strr", "continued_words", "renyi_efficiency",
           "partial_character_tokens", "tokens_vs_baseline")  # fmt: skip
CANDIDATES = {
    "custom_small": {"kind": "custom", "vocab_size": 330},
    "suffixes": {"kind": "custom", "vocab_size": 400, "pre_tokenizer": "keep_apostrophe_suffixes"},
    "more": {"kind": "extension", "new_tokens": 40},
    "guarded": {"kind": "extension", "new_tokens": 40, "protect": {"path": "./english.jsonl"}},
}


@pytest.fixture(scope="module", autouse=True)
def with_pages() -> Iterator[None]:
    """These runs make their pages."""
    with pages():
        yield


def arguments(small: Project) -> list[str]:
    write(
        small.folder / "pairs.jsonl",
        jsonl(*({"az": f"Bağda {'çox ' * (n % 4)}{n} ağac var.", "en": f"There are {n} trees.", "package": str(n % 3)} for n in range(9))),
    )
    base = f"./{small.path('base').relative_to(small.folder)}/final"
    sets = {
        "project": "lab",
        "tokenizer.name_or_path": base,
        "data.parallel": {"path": "./pairs.jsonl", "text_column": "az", "english_column": "en", "by": "package"},
        "show_words": ["qoca", "Bakı'da", "[/b]"],
        "select": "guarded",
        **{f"candidates.{name}": candidate for name, candidate in CANDIDATES.items()},
    }
    return [word for key, value in sets.items() for word in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")]


def result(small: Project, runs: str = "runs") -> Any:
    return json.loads((small.folder / runs / "lab" / "tokenizer" / "result.json").read_text())


def test_every_candidate_is_measured_saved_and_shown(small: Project) -> None:
    printed = small.run("tokenizer", *arguments(small))
    run = small.folder / "runs" / "lab" / "tokenizer"
    found = {line["name"]: line for line in result(small)["candidates"]}
    assert list(found) == ["baseline", "custom", *CANDIDATES]
    for name, line in found.items():
        for key in PER_SET:
            for measure in line[key].values():
                assert measure["interval"] is None or measure["interval"][0] <= measure["value"] <= measure["interval"][1]
        assert line["fertility"]["target"]["interval"] is not None
        assert line["parity"]["interval"][0] < line["parity"]["value"] < line["parity"]["interval"][1]
        assert line["encoding"]["bytes_per_second"] > 0
        tokenizer = AutoTokenizer.from_pretrained(run / "candidates" / name)
        assert len(tokenizer) == line["vocab_size"]
        assert "".join("".join(piece) for piece in line["words"][0]) == "qoca"
        assert f"│ {name}" in printed
    assert found["custom"]["training"]["trained_together"] == ["custom", "custom_small"]
    assert found["baseline"]["tokens_vs_baseline"]["target"]["value"] == 1
    assert found["custom"]["fertility"]["target"]["value"] < found["baseline"]["fertility"]["target"]["value"]
    assert found["guarded"]["tokens_vs_baseline"]["english"] == {"value": 1.0, "interval": None}
    assert found["guarded"]["protect"] == {
        "source": "./english.jsonl",
        "documents": 40,
        "bytes": (small.folder / "english.jsonl").stat().st_size - 40 * len('{"text": ""}\n'),
        "held_out_documents": 0,
    }
    assert found["more"]["embedding_rows_added"] == 40
    assert found["more"]["embedding_parameters_added"] == 40 * 32  # tied: one matrix
    assert len(found["suffixes"]["words"][1]) == 1 < len(found["custom"]["words"][1])
    final, guarded = (AutoTokenizer.from_pretrained(folder) for folder in (run / "final", run / "candidates" / "guarded"))
    assert final.get_vocab() == guarded.get_vocab()
    assert {p.name for p in (run / "final").iterdir()} == {p.name for p in (run / "candidates" / "guarded").iterdir()} - {"candidate.json"}
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    for word in ("qoca", "guarded", "fertility", "custom, keep_apostrophe_suffixes"):
        assert word in page


def test_sigterm_is_told_and_what_is_made_is_kept(small: Project) -> None:
    folder = small.folder / "runs" / "lab" / "tokenizer"
    code = small.interrupt("tokenizer", lambda _: any(folder.glob("candidates/*/candidate.json")), signal.SIGTERM, *arguments(small))
    status = json.loads((folder / "status.json").read_text())
    assert (code, status["state"], status["exit_code"]) == (143, "interrupted", 143)
    assert "finished work is kept" in status["message"]


def test_a_run_made_before_a_key_was_there_is_still_this_recipes(small: Project) -> None:
    from azrecipe.recipe.to_yaml import to_yaml
    from azrecipe.recipe.yaml_tree import parse_yaml

    file = small.path("tokenizer") / "recipe.yaml"
    old: Any = parse_yaml(file.read_text(), str(file)).to_plain()
    for part, key in (("data", "max_length"), ("candidates.custom", "pre_tokenizer"), ("data.datasets.0", "normalize")):
        below = old
        for name in part.split("."):
            below = below[int(name) if name.isdigit() else name]
        del below[key]
    write(file, to_yaml(old))
    assert "already complete" in small.run("tokenizer")
    assert "pre_tokenizer" in small.run("tokenizer", "--set", "candidates.custom.pre_tokenizer=llama3", code=2)


def timeless(line: Any) -> Any:
    """A line of the result without what differs from run to run."""
    training = {k: v for k, v in (line.get("training") or {}).items() if k not in ("seconds", "peak_memory_bytes")}
    return {**{k: v for k, v in line.items() if k != "encoding"}, "training": training}


def test_a_kill_loses_no_candidate_that_was_made_and_a_damaged_one_is_made_again(small: Project) -> None:
    given = arguments(small)
    small.run("tokenizer", *given, runs="whole")

    folder = small.folder / "runs" / "lab" / "tokenizer" / "candidates"

    def two_families_are_saved(_: Path) -> bool:
        return (folder / "suffixes" / "candidate.json").exists()

    assert small.interrupt("tokenizer", two_families_are_saved, signal.SIGKILL, *given) == -signal.SIGKILL
    torn = folder / "suffixes" / "tokenizer.json"
    torn.write_bytes(torn.read_bytes()[:1000])
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/candidate.json") if p.parent.name != "suffixes"}
    assert before
    small.run("tokenizer", *given)
    families = [["custom", "custom_small"], ["suffixes"], ["more"], ["guarded"]]
    whole = [family for family in families if all((folder / name / "candidate.json") in before for name in family)]
    for family in whole:
        for name in family:
            assert (folder / name / "candidate.json").stat().st_mtime_ns == before[folder / name / "candidate.json"]

    assert list(map(timeless, result(small)["candidates"])) == list(map(timeless, result(small, "whole")["candidates"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("candidates.custom.vocab_size=264", "vocab_size = 264 is too small: the 256 bytes and the base's 8 special and added tokens"),
        ("data.parallel={path: ./pairs.jsonl, text_column: az, english_column: eng}", "no column 'eng'. Columns: az, en"),
        ("data.parallel={path: ./none.jsonl, text_column: az, english_column: en}", "no such file"),
        ("candidates.guarded.protect={path: ./none.jsonl}", "no such file"),
        ("candidates.guarded.protect={path: ./torn.jsonl}", "torn.jsonl:41:1: not a line of JSON"),
        (
            "candidates.guarded.protect={path: ./english.jsonl, scripts: {allow: [Cyrillic]}}",
            "holds no text to protect (its clean-up drops 40 of 40 documents)",
        ),
        ("data.datasets[0].scripts={allow: [Cyrillic]}", "holds no text that is not held out (its clean-up drops 40 of 40 documents)"),
        ('show_words=[" "]', "show_words[0]"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    small: Project, cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, change: str, says: str
) -> None:
    write(small.folder / "torn.jsonl", (small.folder / "english.jsonl").read_text() + '{"text": "A fox')
    monkeypatch.chdir(small.folder)
    done = cli("run", "tokenizer.yaml", *arguments(small), "--set", change)
    assert done.code == 2
    assert says in done.text
    assert not (small.folder / "runs" / "lab").exists()


def test_a_base_that_is_no_byte_level_bpe_says_what_still_works(small: Project) -> None:
    from tests.unit.tokenization.test_tokenizer_metrics import _sentencepiece

    _sentencepiece().save_pretrained(small.folder / "pieces")
    given = ["--set", "tokenizer.output_of=null", "--set", "tokenizer.name_or_path=./pieces", "--set", "project=pieces"]
    printed = small.run("tokenizer", *given, "--set", "candidates.more={kind: extension, new_tokens: 9}", code=2)
    assert "its model is Unigram" in printed
    assert "What still works: kind: baseline, and kind: custom with pre_tokenizer: llama3" in printed
    assert printed.count("not a byte-level BPE") == 2
    small.run("tokenizer", *given, "--set", "candidates.custom.pre_tokenizer=llama3")
    found = json.loads((small.folder / "runs" / "pieces" / "tokenizer" / "result.json").read_text())["candidates"]
    assert [line["name"] for line in found] == ["baseline", "custom"]
    assert found[1]["fertility"]["target"]["value"] > 1
