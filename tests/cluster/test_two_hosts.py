"""The job that is described to SageMaker, run by its own entry point on two hosts that share nothing but S3 and a network."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from azrecipe import sagemaker
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.sagemaker import cloudwatch_metrics
from azrecipe.sagemaker.jobs import TrainingJob
from tests import aws
from tests.cluster.hosts import Running, why_not
from tests.conftest import ROOT, write

RECIPE = ROOT / "recipes" / "quickstart" / "pretrain.yaml"
SHORT = (
    "phases[0].num_train_epochs=null",
    "phases[0].max_steps=60",
    "training.save_steps=10",
    "training.logging_steps=5",
    "training.eval_steps=30",
)


@pytest.fixture(scope="module", autouse=True)
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := why_not():
        pytest.skip(reason)
    with aws.loopback(tmp_path_factory.mktemp("aws")):
        aws.furnish()
        yield


def submit(folder: Path, prefix: str, hosts: int = 2, *sets: str) -> TrainingJob:
    settings = f"role: {aws.ROLE}\nbucket: azrecipe-{{account}}-{{region}}\nprefix: {prefix}\ninstance_type: ml.m5.xlarge\npytorch_version: '{metadata.version('torch').rpartition('.')[0]}'\ninstance_count: {hosts}\nupload_data: true\n"
    job = sagemaker.submit(
        str(RECIPE), str(write(folder / "settings.yaml", settings)), yes=True, check=False, plan=False, set=[*SHORT, *sets]
    )
    assert job is not None and job.request is not None
    return job


def run(job: TrainingJob, folder: Path) -> Running:
    assert job.request is not None
    return Running(job.request, folder / "hosts")


def weights(folder: Path) -> Mapping[str, Any]:
    return load_file(folder / "model.safetensors")


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that nothing has happened to; what its hosts have left."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(folder, "whole")
    with run(job, folder) as running:
        codes = running.wait()
        assert codes == [0, 0], running.hosts[0].said[-4000:] + running.hosts[1].said[-2000:]
    fetched = job.fetch(folder / "runs")
    write(folder / "fetched", str(fetched))
    return folder


def test_two_hosts_train_one_model_and_leave_it_where_sagemaker_takes_it(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, second = (whole / "hosts" / f"algo-{n}" for n in (1, 2))
    model = first / "ml" / "model"
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert net.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=4).shape[1] >= 5
    assert not list((second / "ml" / "model").iterdir()) and not (first / "ml" / "output" / "failure").exists()
    log = (first / "log.txt").read_text()
    assert "ddp, 2 processes" in log and "algo-1 (1 of 2)" in log and "algo-2 (2 of 2)" in (second / "log.txt").read_text()
    assert list((first / "ml" / "output" / "tensorboard").rglob("events.out.tfevents.*"))
    run_directory = Path((whole / "fetched").read_text())
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for each in cloudwatch_metrics.build_metric_definitions(load_recipe(RECIPE, parse_overrides(SHORT))):
        found[each["Name"]] = [float(match.group(1)) for line in log.splitlines() if (match := re.search(each["Regex"], line))]
    assert found["train:loss"] == [line["loss"] for line in lines if "loss" in line] and len(found["train:loss"]) >= 12
    assert found["train:peak_memory_gib"] and found["train:tokens_per_second"] and found["eval:bits_per_byte_english"]
    assert same(weights(run_directory / "final"), weights(model))
    from azrecipe.report import page

    assert page.write_page(run_directory).stat().st_size > 10_000


def test_torch_is_left_as_the_image_has_it(whole: Path) -> None:
    log = (whole / "hosts" / "algo-1" / "log.txt").read_text()
    assert "Installing requirements" in log and "Requirement already satisfied: transformers" in log and "Collecting torch" not in log


def test_a_host_that_is_killed_costs_no_more_than_the_steps_since_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, "killed")
    with run(job, tmp_path) as running:
        running.until("step=25 ")
        running.hosts[1].signal(signal.SIGKILL)
        codes = running.wait()
    assert all(codes)
    failure = tmp_path / "hosts" / "algo-1" / "ml" / "output" / "failure"
    assert not failure.exists() or len(failure.read_text().splitlines()) == 1
    again = submit(tmp_path, "killed")
    assert again.name != job.name
    with run(again, tmp_path) as running:
        codes = running.wait()
        log = running.hosts[0].said
    assert codes == [0, 0], log[-4000:]
    assert re.search(r"going on from .*checkpoint-(10|20)\b", log), log[-3000:]
    assert same(weights(tmp_path / "hosts" / "algo-1" / "ml" / "model"), weights(whole / "hosts" / "algo-1" / "ml" / "model"))
    assert sagemaker.submit(str(RECIPE), str(tmp_path / "settings.yaml"), yes=True, check=False, plan=False, set=SHORT) is None  # complete


def test_a_stop_saves_a_checkpoint_that_one_host_goes_on_from(tmp_path: Path) -> None:
    job = submit(tmp_path, "stopped", 2, "training.save_steps=1000")
    with run(job, tmp_path) as running:
        running.until("step=15 ")
        began = time.monotonic()
        running.stop()
        codes = running.wait()
        took = time.monotonic() - began
        log = running.hosts[0].said
    assert took < 120 and "SIGTERM" in log and "interrupted; a checkpoint is saved" in log, log[-3000:]
    assert codes == [143, 143] and not (tmp_path / "hosts" / "algo-1" / "ml" / "output" / "failure").exists()
    alone = submit(tmp_path, "stopped", 1, "training.save_steps=1000")
    with run(alone, tmp_path) as running:
        codes = running.wait()
        log = running.hosts[0].said
    assert codes == [0] and re.search(r"going on from .*checkpoint-1[5-9]\b|checkpoint-2\d\b", log), log[-3000:]
    assert (tmp_path / "hosts" / "algo-1" / "ml" / "model" / "model.safetensors").exists()


def test_a_failure_is_one_readable_line(tmp_path: Path) -> None:
    job = submit(tmp_path, "failing", 2, "data.max_length=4096")
    with run(job, tmp_path) as running:
        codes = running.wait()
    assert all(codes)
    text = (tmp_path / "hosts" / "algo-1" / "ml" / "output" / "failure").read_text()
    assert re.fullmatch(r"azrecipe: \S*pretrain\.yaml:\d+:\d+: data.max_length = 4,096 is more than the model's 512 positions", text)
