"""A run on text that its recipe cleans: what is trained on, and what the result says of the rest."""

from __future__ import annotations

import unicodedata

from tests.conftest import TALES, jsonl, write
from tests.small import Project

CYRILLIC = "Кәнддә бир гоҹа јашајырды."
ARABIC = "کندده بیر قوجا یاشاییردی."


def test_a_run_reports_what_was_cleaned(small: Project) -> None:
    more = jsonl(*({"text": text} for text in (CYRILLIC, ARABIC, unicodedata.normalize("NFD", TALES[1]))))
    write(small.folder / "dirty.jsonl", (small.folder / "azerbaijani.jsonl").read_bytes() + more.encode())
    source = "data.datasets[0]={path: dirty.jsonl, normalize: [nfc], scripts: {allow: [Latin]}}"
    small.run("phase1", "--set", source, "--set", "phases[0].max_steps=1")
    first, second = small.result("phase1")["data"]
    assert first["documents"] == 41
    assert (first["cleaned"]["documents"], first["cleaned"]["dropped_documents"]) == (43, 2)
    assert first["cleaned"]["changed_documents"] == 1
    assert {sample["text"] for sample in first["cleaned"]["samples"]["dropped"]} == {CYRILLIC, ARABIC}
    assert "cleaned" not in second
