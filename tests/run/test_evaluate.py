"""Whole evaluations of small models: what the numbers must be, a run that is killed in the middle, models that cannot be measured."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, Done, write
from tests.small import Project, fill

EVALUATE = """
stage: evaluate
extends: evaluate.yaml
models:
  twin: {name_or_path: ./twin}
  tuned: {name_or_path: ./runs/small/sft/adapter}
baseline: adapted
language: az
script: Latin
prompts: [Kənddə bir, {messages: [{role: user, content: "Bu neçədir: 2 + 2?"}]}, {text: The fox lived, language: en}]
answers: {output_of: sft.yaml}
tasks: [tasks/completion.yaml]
generation: {temperature: 0.7}
per_device_eval_batch_size: 2
"""
WITHOUT_TASKS = ("--set", "tasks=[]")
EXAMPLE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def example(kind: str) -> str:
    """The task file, or its data, that docs/evaluation.md shows."""
    return EXAMPLE.partition(f"```{kind}\n")[2].partition("```")[0]


def prepare(finished: Project, folder: Path) -> Project:
    """The finished job with recipes of this module's."""
    project = fill(folder)
    for name in ("base", "tokenizer", "cpt", "sft"):
        shutil.copytree(finished.path(name), project.path(name))
    shutil.copytree(finished.path("cpt") / "final", folder / "twin")
    write(folder / "more.yaml", EVALUATE)
    write(folder / "tasks/completion.yaml", example("yaml"))
    write(folder / "tasks/completion.jsonl", example("json"))
    return project


@pytest.fixture(scope="module")
def evaluated(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The evaluation, run once; tests only read it."""
    project = prepare(finished, tmp_path_factory.mktemp("evaluated"))
    write(project.folder / "printed.txt", project.run("more"))
    return project


@pytest.fixture
def own(finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The same project in the current folder, not evaluated."""
    monkeypatch.chdir(tmp_path)
    return prepare(finished, tmp_path)


def measured(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every {"value", …} below a value, with the keys that lead to it."""
    if isinstance(value, dict) and "value" in value:
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from measured(inner, (*at, key))


def test_every_measure_lies_in_its_interval(evaluated: Project) -> None:
    models = evaluated.result("more")["models"]
    assert list(models) == ["base", "adapted", "assistant", "twin", "tuned"]
    checked = 0
    for line in models.values():
        for at, found in measured({key: value for key, value in line.items() if key not in ("difference", "tasks")}):
            if found["value"] is not None and found["interval"] is not None:
                assert found["interval"][0] <= found["value"] <= found["interval"][1], at
                checked += 1
        assert line["bpb"]["english"]["interval"] is None, "a single document"
    assert checked > 50


def test_a_model_differs_from_itself_by_nothing(evaluated: Project) -> None:
    models = evaluated.result("more")["models"]
    assert "difference" not in models["adapted"], "the baseline"
    differences = dict(measured(models["twin"]["difference"]))
    assert {at[0] for at in differences} == {"bpb", "fertility", "bytes_per_token", "generations", "answers", "tasks"}
    for at, found in differences.items():
        assert found["value"] in (0, None), at
        assert found["interval"] in ([0, 0], None), at
    assert differences["bpb", "target"]["interval"] == [0, 0]
    assert models["base"]["difference"]["bpb"]["target"]["interval"][0] > 0


def test_an_adapter_on_its_base_is_the_merged_model(evaluated: Project) -> None:
    models = evaluated.result("more")["models"]
    assert models["tuned"]["adapter"].endswith("sft/adapter")
    for key in ("bpb", "generations", "answers", "tasks", "samples"):
        assert models["tuned"][key] == models["assistant"][key]
    assert [line["form"] for line in models["tuned"]["samples"]] == ["text", "chat", "text"], "the template of its run"


def test_what_is_answered_was_never_trained_on(evaluated: Project) -> None:
    from azrecipe.data import conversations

    rows = [json.loads(line)["messages"] for line in (evaluated.folder / "questions.jsonl").read_text().splitlines()]
    train, held_out, _ = conversations.split_held_out(rows, 0.2)
    result = evaluated.result("more")
    assert result["answers"]["conversations"] == result["answers"]["held_out"] == len(held_out)
    lines = [json.loads(line) for line in (evaluated.path("more") / "models/base/answers.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {messages[0]["content"] for messages in held_out}
    assert not {line["prompt"] for line in lines} & {messages[0]["content"] for messages in train}
    assert {sample["reference"] for sample in result["answers"]["samples"]} <= {messages[-1]["content"] for messages in held_out}
    assert result["models"]["assistant"]["answers"]["chrf"]["value"] > result["models"]["base"]["answers"]["chrf"]["value"]


def test_a_task_file_is_scored_by_log_likelihoods(evaluated: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = evaluated.result("more")
    rows = [json.loads(line) for line in example("json").splitlines()]
    assert result["tasks"]["completion"] == {
        "version": 1.0,
        "num_fewshot": 0,
        "questions": len(rows),
        "limit": None,
        "apply_chat_template": False,
    }
    for name, recipe in (("base", "base"), ("adapted", "cpt"), ("assistant", "sft")):
        folder = evaluated.path(recipe) / "final"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        right = []
        for row in rows:
            start = tokenizer(row["question"])["input_ids"]
            scores = []
            for choice in row["choices"]:
                ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
                with torch.no_grad():
                    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                scores.append(sum(float(log_p[at - 1, ids[at]]) for at in range(len(start), len(ids))))
            right.append(max(range(len(scores)), key=scores.__getitem__) == row["answer"])
        found = result["models"][name]["tasks"]["completion"]["acc"]
        share = sum(right) / len(rows)
        assert found["value"] == pytest.approx(share)
        assert found["stderr"] == pytest.approx((share * (1 - share) / (len(rows) - 1)) ** 0.5)


def test_the_table_shows_values_with_intervals_and_differences(evaluated: Project) -> None:
    printed = (evaluated.folder / "printed.txt").read_text()
    models = evaluated.result("more")["models"]
    found = models["base"]["bpb"]["target"]
    assert f"{found['value']:.3f} [{found['interval'][0]:.3f}–{found['interval'][1]:.3f}]" in printed
    assert f"Δ {models['base']['difference']['bpb']['target']['value']:+.3f} [" in printed
    for row in ("tokens/word, english", "answers, chrF++", "answers, ROUGE-L", "prompts, language", "completion acc"):
        assert f"│ {row} " in printed
    assert f"{models['base']['tasks']['completion']['acc']['value']:.3f} ± " in printed


def test_kill_9_in_the_middle_of_writing_changes_nothing_and_writes_nothing_twice(own: Project, evaluated: Project) -> None:
    def in_the_middle(run: Path) -> bool:
        file = run / "models/assistant/answers.jsonl"
        return file.exists() and file.read_bytes().count(b"\n") >= 3

    assert own.interrupt("more", in_the_middle, signal.SIGKILL, *WITHOUT_TASKS) == -signal.SIGKILL
    file = own.path("more") / "models/assistant/answers.jsonl"
    with file.open("ab") as opened:
        opened.write(b'{"nth": 0, "prompt": "B\xc9')
    before = {path: path.read_bytes() for path in (own.path("more") / "models").rglob("*.json*") if path != file}
    kept = file.read_bytes().splitlines()[:3]
    own.run("more", *WITHOUT_TASKS)
    assert {path: path.read_bytes() for path in before} == before, "what was measured is not measured again"
    assert file.read_bytes().splitlines()[:3] == kept
    for lines in (own.path("more") / "models").rglob("*.jsonl"):
        numbers = [json.loads(line)["nth"] for line in lines.read_text().splitlines()]
        assert sorted(numbers) == list(range(len(numbers)))
    mine, theirs = own.result("more"), evaluated.result("more")
    for line in theirs["models"].values():
        del line["tasks"]
        line.get("difference", {}).pop("tasks", None)
    for key in ("harness", "tasks"):
        del theirs[key]
    assert mine == theirs


def refused(cli: Callable[..., Done], *arguments: str, code: int = 2) -> str:
    """What is said when the evaluation is refused; nothing may have begun."""
    done = cli("run", "more.yaml", *WITHOUT_TASKS, *arguments)
    assert (done.code, "Traceback" in done.text) == (code, False), done.text
    assert not Path("runs/small/more").exists()
    return done.text


def test_models_that_cannot_be_measured_are_refused_all_at_once(own: Project, cli: Callable[..., Done]) -> None:
    shutil.copytree("twin", "bare")
    Path("bare/model.safetensors").unlink()
    write("other/adapter_config.json", Path("runs/small/sft/adapter/adapter_config.json").read_text())
    said = refused(
        cli,
        "--set", "models.copy.name_or_path=./runs/small/cpt/final",
        "--set", "models.bare.name_or_path=./bare",
        "--set", "models.gone.name_or_path=./gone",
        "--set", "models.none.name_or_path=./tasks",
        "--set", "models.alien={output_of: base.yaml, adapter: ./runs/small/sft/adapter}",
        "--set", "models.empty={output_of: cpt.yaml, adapter: ./other}",
        "--set", "models.noadapter={output_of: cpt.yaml, adapter: ./twin}",
    )  # fmt: skip
    for expected in (
        "'copy' is the same model as 'adapted'",
        "the folder ./bare holds a model's configuration and no weights",
        "there is no folder ./gone to take the model from",
        "the folder ./tasks holds no model that transformers can open",
        "the adapter ./runs/small/sft/adapter was trained on runs/small/cpt/final, and this model is runs/small/base/final",
        "the adapter's folder ./other holds no weights",
        "./twin is not the folder of an adapter: it has no adapter_config.json",
    ):
        assert expected in said
    assert "'copy' is the same model as 'adapted'" in refused(cli, "--set", "models.copy.output_of=cpt.yaml"), "by its file alone"


def test_an_adapter_of_another_base_is_refused(own: Project, llama: Path, cli: Callable[..., Done]) -> None:
    for name in ("smaller", "moved"):
        shutil.copytree("runs/small/sft/adapter", name)
    config = json.loads(Path("smaller/adapter_config.json").read_text())
    write("smaller/adapter_config.json", json.dumps({**config, "base_model_name_or_path": str(llama)}))
    write("moved/adapter_config.json", json.dumps({**config, "base_model_name_or_path": "./elsewhere/final"}))
    said = refused(cli, "--set", "models={a: {name_or_path: ./smaller}, b: {name_or_path: ./moved}}", "--set", "baseline=a")
    assert f"the adapter ./smaller is for another base than {llama}: its layer model.layers.0." in said
    assert "the adapter ./moved was trained on ./elsewhere/final, and there is no such folder here" in said


def test_prompts_and_conversations_that_leave_no_room_are_told(own: Project, cli: Callable[..., Done]) -> None:
    said = refused(cli, "--set", "generation.max_new_tokens=126")
    assert "more.yaml" in said
    assert "base: the prompt has" in said
    assert "with generation.max_new_tokens = 126 that is more than the model's 128 positions" in said
    assert "no held-out conversation leaves room" in refused(cli, "--set", "generation.max_new_tokens=126", "--set", "prompts=[]")
    assert "cpt.yaml is a pretrain recipe, which leaves no held-out conversations" in refused(cli, "--set", "answers.output_of=cpt.yaml")


def test_tasks_are_looked_for_before_anything_starts(own: Project, cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def said(tasks: str, code: int = 2) -> str:
        done = cli("run", "more.yaml", "--set", f"tasks={tasks}")
        assert (done.code, "Traceback" in done.text, Path("runs/small/more").exists()) == (code, False, False), done.text
        return done.text

    assert "no such task file: ./tasks/completoin.yaml; did you mean 'completion.yaml'?" in said("[./tasks/completoin.yaml]")
    write("tasks/broken.yaml", "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\ntest_split: test\n")
    assert "./tasks/broken.yaml: lm-evaluation-harness cannot load this task" in said("[./tasks/broken.yaml]")
    assert "models without a chat template: base, adapted, twin" in said("[{task: ./tasks/completion.yaml, apply_chat_template: true}]")
    unknown = said("[belebele_azj_Latin, include_base_44_azerbaijani]")
    assert "has no task 'belebele_azj_Latin'; did you mean 'belebele_azj_Latn'?" in unknown
    assert "include_base_44_azerbaijani'" not in unknown
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'azrecipe[harness]'" in said("[belebele_azj_Latn]", code=3)
