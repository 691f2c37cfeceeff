"""Stage merge on the small project: a chat vector for a model with another vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write
from tests.small import Project, copied, weights

CHAT = """
stage: sft
project: small
extends: sft.yaml
model: {output_of: base.yaml}
adapter: none
lora: null
training: {learning_rate: 5e-3, max_steps: 4}
"""
CHAT_VECTOR = """
stage: merge
project: small
method: task_arithmetic
models: {adapted: {output_of: cpt.yaml}, chat: {output_of: chat.yaml, weight: 0.5}}
base: {output_of: base.yaml}
special_tokens_from: chat
"""
EVALUATE = """
stage: evaluate
project: small
models: {adapted: {output_of: cpt.yaml}, merged: {output_of: chat_vector.yaml}}
data: {max_length: 64, validation: {target: {path: held.jsonl}}}
prompts: [{messages: [{role: user, content: "Bu neçədir: 2 + 2?"}]}]
generation: {max_new_tokens: 4}
"""
PIPELINE = """
stage: pipeline
project: small
steps: [chat.yaml, chat_vector.yaml, evaluate_merged.yaml]
"""


@pytest.fixture(scope="module")
def merged(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with a merged model, made and measured by a pipeline."""
    project = copied(finished, tmp_path_factory.mktemp("merged"))
    (project.path("cpt").parent).mkdir(exist_ok=True)
    import shutil

    shutil.copytree(finished.path("cpt"), project.path("cpt"))
    for name, text in (("chat", CHAT), ("chat_vector", CHAT_VECTOR), ("evaluate_merged", EVALUATE), ("merging", PIPELINE)):
        write(project.folder / f"{name}.yaml", text)
    write(project.folder / "printed.txt", project.run("merging"))
    return project


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def final_weights(project: Project, *names: str) -> list[Mapping[str, Any]]:
    return [weights(project.path(name) / "final") for name in names]


def test_layers_get_the_chat_vector(merged: Project) -> None:
    import torch

    base, adapted, chat, result = final_weights(merged, "base", "cpt", "chat", "chat_vector")
    assert result.keys() == adapted.keys()
    for name in result.keys() - {"model.embed_tokens.weight"}:
        torch.testing.assert_close(result[name], adapted[name] + 0.5 * (chat[name] - base[name]), msg=name)


def test_each_row_of_the_embeddings_is_that_of_its_token(merged: Project) -> None:
    import torch

    base, adapted, chat, result = (
        each["model.embed_tokens.weight"] for each in final_weights(merged, "base", "cpt", "chat", "chat_vector")
    )
    old, new = (load_tokenizer(merged.path(name) / "final") for name in ("base", "cpt"))
    chat_vocabulary, old_vocabulary = load_tokenizer(merged.path("chat") / "final").get_vocab(), old.get_vocab()
    special = {token.content for token in old.added_tokens_decoder.values() if token.special}
    counts = {"merged": 0, "special": 0, "kept": 0}
    for token, row in new.get_vocab().items():
        if token in special:
            expected, kind = chat[chat_vocabulary[token]], "special"
        elif token in old_vocabulary:
            expected, kind = adapted[row] + 0.5 * (chat[chat_vocabulary[token]] - base[old_vocabulary[token]]), "merged"
        else:
            expected, kind = adapted[row], "kept"
        counts[kind] += 1
        torch.testing.assert_close(result[row], expected, msg=token)
    assert all(counts.values())
    assert merged.result("chat_vector")["rows"] == {**counts, "padding": len(result) - len(new)}


def test_the_merged_model_answers(merged: Project) -> None:
    final = merged.path("chat_vector") / "final"
    tokenizer = load_tokenizer(final)
    assert tokenizer.chat_template == load_tokenizer(merged.path("chat") / "final").chat_template
    ends = json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    assert "<|eot_id|>" in tokenizer.convert_ids_to_tokens([ends] if isinstance(ends, int) else ends)
    measured = merged.result("evaluate_merged")["models"]["merged"]
    assert measured["bpb"]["target"]["value"] > 0 and measured["samples"]


def test_it_can_be_checked_before_its_models_are_there(merged: Project, finished: Project, tmp_path: Path) -> None:
    project = copied(finished, tmp_path)
    for name, text in (("chat", CHAT), ("chat_vector", CHAT_VECTOR), ("evaluate_merged", EVALUATE), ("merging", PIPELINE)):
        write(project.folder / f"{name}.yaml", text)
    write(project.folder / "merging.yaml", PIPELINE.replace("steps: [", "steps: [cpt.yaml, "))
    assert project_check(project, "merging") == 0


def project_check(project: Project, recipe: str) -> int:
    import sys

    from tests.small import called

    return called([sys.executable, "-m", "azrecipe", "check", f"{recipe}.yaml"], project.folder).code
