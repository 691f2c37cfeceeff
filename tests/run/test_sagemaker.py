"""A recipe as a SageMaker training job, asked for through the SDK from moto's server."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from azrecipe import sagemaker
from azrecipe.errors import CannotRun, CommandError, RecipeError
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.pipeline_steps import load_pipeline
from azrecipe.sagemaker import bundle, cloudwatch_metrics
from azrecipe.sagemaker import load as load_settings
from tests import aws
from tests.conftest import ROOT, TALES, Done, write
from tests.small import called

boto3 = pytest.importorskip("boto3")
pytest.importorskip("sagemaker.train")

SETTINGS = f"""\
role: {aws.ROLE}
bucket: azrecipe-{{account}}-{{region}}
instance_type: ml.g5.8xlarge
"""
RECIPE = """\
stage: pretrain
project: p
model: {config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128}}
tokenizer: {family: llama3, vocab_size: 320}
data: {max_length: 64, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 4}]
training: {global_batch_size: 4, per_device_train_batch_size: 4, precision: float32}
"""
QUICK = ("--yes", "--no-check", "--no-plan")


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with aws.loopback(tmp_path_factory.mktemp("aws")) as address:
        aws.furnish()
        yield address


@pytest.fixture
def here(account: str, project: Path) -> Path:
    write("settings.yaml", SETTINGS)
    write("recipe.yaml", RECIPE)
    return project


def code_in(uri: str) -> list[str]:
    """The files of a job's code."""
    packed = boto3.client("s3").get_object(Bucket=aws.BUCKET, Key=uri.removeprefix(f"s3://{aws.BUCKET}/"))["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return archive.getnames()


def submitted(cli: Callable[..., Done], recipe: str = "recipe.yaml", *more: str) -> str:
    done = cli("sagemaker", "submit", recipe, "--config", "settings.yaml", "--upload-data", *QUICK, *more)
    assert done.code == 0, done.text
    return done.out.strip()


def test_the_job_is_the_one_that_was_asked_for(here: Path) -> None:
    write("settings.yaml", SETTINGS + "max_runtime_in_seconds: 7_200\nvolume_size_in_gb: 200\ntags: {team: baku}\nenvironment: {NCCL_DEBUG: INFO}\n"
          "subnets: [subnet-0a1b]\nsecurity_group_ids: [sg-0a1b]\nhub_token_secret: null\n")  # fmt: skip
    job = sagemaker.submit("recipe.yaml", "settings.yaml", yes=True, check=False, plan=False, upload_data=True, instance_count=2,
                           enable_managed_spot_training=True)  # fmt: skip
    assert job is not None and job.request is not None
    asked, said = job.request, job.describe()
    root = f"s3://{aws.BUCKET}/azrecipe"
    assert said["RoleArn"] == f"arn:aws:iam::{aws.ACCOUNT}:role/{aws.ROLE}"
    assert said["ResourceConfig"] == {"InstanceType": "ml.g5.8xlarge", "InstanceCount": 2, "VolumeSizeInGB": 200}
    assert said["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400} and said["EnableManagedSpotTraining"]
    assert asked["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    assert said["OutputDataConfig"]["S3OutputPath"] == f"{root}/output" and asked["OutputDataConfig"]["CompressionType"] == "NONE"
    assert said["CheckpointConfig"] == {"S3Uri": f"{root}/runs/p/recipe/", "LocalPath": "/opt/ml/checkpoints"}
    assert asked["TensorBoardOutputConfig"] == {"S3OutputPath": f"{root}/tensorboard/p/recipe", "LocalPath": "/opt/ml/output/tensorboard"}
    assert said["VpcConfig"] == {"Subnets": ["subnet-0a1b"], "SecurityGroupIds": ["sg-0a1b"]}
    assert {tag["Key"]: tag["Value"] for tag in asked["Tags"]} == {"team": "baku", "azrecipe:run": "p/recipe"}
    assert asked["Environment"]["NCCL_DEBUG"] == "INFO"
    image = said["AlgorithmSpecification"]["TrainingImage"]
    assert (
        image
        == "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-pytorch-training:2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04"
    )
    assert not asked["HyperParameters"]  # SageMaker's driver would put them into a shell
    channels = {each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"] for each in said["InputDataConfig"]}
    assert set(channels) == {"data0", "data1", "code", "sm_drivers"}
    assert set(code_in(channels["code"])) >= {
        "sagemaker_entry.py",
        "job.json",
        "job/recipe.yaml",
        "requirements.txt",
        "constraints.txt",
    }
    script = boto3.client("s3").get_object(
        Bucket=aws.BUCKET, Key=channels["sm_drivers"].removeprefix(f"s3://{aws.BUCKET}/") + "/sm_train.sh"
    )
    assert b"\nexec python sagemaker_entry.py\n" in script["Body"].read()  # process 1, or nobody would hear SIGTERM


def test_the_recipe_in_the_container_is_the_recipe_here_with_other_paths(here: Path, cli: Callable[..., Done]) -> None:
    write("tokenizer.yaml", "stage: tokenizer\nproject: p\ntokenizer: {name_or_path: ./llama}\ndata: {datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}\n"
          "candidates: {custom: {kind: custom, vocab_size: 300}}\n")  # fmt: skip
    write("recipe.yaml", RECIPE.replace("tokenizer: {family: llama3, vocab_size: 320}", "tokenizer: {output_of: tokenizer.yaml}"))
    done = cli("sagemaker", "pack", "recipe.yaml", "--config", "settings.yaml", "--upload-data", "source")
    assert done.code == 0, done.text
    packed, own = load_recipe("source/job/recipe.yaml"), load_recipe("recipe.yaml")
    assert json.loads(Path("source/job.json").read_text())["runs"] == {"run0": "p/tokenizer"}
    assert packed.config.data.datasets[0].path == "/opt/ml/input/data/data0/text.txt"
    assert packed.config.data.validation["target"].path == "/opt/ml/input/data/data1/heldout.txt"
    assert packed.config.training == replace(own.config.training, report_to=["tensorboard"])  # SageMaker shows what it writes
    assert (packed.config.phases, packed.project, packed.name) == (own.config.phases, own.project, own.name)
    # The source folder is a whole azrecipe: what the container runs is what is here
    found = python("-c", "import azrecipe.utils.shipped_files as r; print(r.locate_root())")
    assert Path(found.stdout.strip()).samefile("source/azrecipe/_shipped"), found.stderr


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own in the source folder, as the container starts it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd="source",
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("recipe", sorted(str(file.relative_to(ROOT)) for file in (ROOT / "recipes").rglob("pipeline.yaml")))
def test_every_step_that_ships_can_be_read_in_the_container(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pack` loads what it has written; what a stage needs beside the base comes with it."""
    monkeypatch.chdir(ROOT)
    settings = load_settings("sagemaker/cpt.yaml", upload_data=True)
    for step in load_pipeline(recipe)[1]:
        try:
            packed = bundle.build_bundle(step.recipe, settings.for_step(step.key))
        except RecipeError as error:
            assert "there is nothing" in str(error), error  # text that the user is to lay beside it
            continue
        names = packed.source_files["requirements.txt"].decode()
        assert ("sacrebleu" in names) == (step.recipe.stage == "evaluate") and "\ntorch>" not in names


@pytest.mark.long
def test_the_command_line_wins_over_the_settings_of_a_step(here: Path, cli: Callable[..., Done]) -> None:
    write(
        "settings.yaml",
        SETTINGS
        + "steps: {recipe.yaml: {instance_type: ml.g5.12xlarge, max_runtime_in_seconds: 9000}}\nmax_wait_time_in_seconds: 500000\n",
    )
    (found,) = sagemaker.requests("recipe.yaml", "settings.yaml", plan=False, upload_data=True)
    assert found["request"]["ResourceConfig"]["InstanceType"] == "ml.g5.12xlarge"
    more = {"instance_type": "ml.g5.xlarge", "enable_managed_spot_training": True, "max_wait_time_in_seconds": 700}
    (found,) = sagemaker.requests("recipe.yaml", "settings.yaml", plan=False, upload_data=True, **more)
    assert found["request"]["ResourceConfig"] == {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 250}  # its own disk
    assert found["request"]["StoppingCondition"] == {"MaxRuntimeInSeconds": 9000, "MaxWaitTimeInSeconds": 9000}
    with pytest.raises(CommandError, match=r"accelerate_config = .fsdpp. is not known.*fsdp"):
        sagemaker.requests("recipe.yaml", "settings.yaml", accelerate_config="fsdpp")


def test_a_run_whose_model_is_not_all_there_is_not_complete(here: Path, cli: Callable[..., Done], small_run: Path) -> None:
    write("third.yaml", RECIPE.replace("project: p", "project: r"))
    s3, key = boto3.client("s3"), "azrecipe/runs/r/third"
    s3.put_object(Bucket=aws.BUCKET, Key=f"{key}/status.json", Body=b'{"state": "complete", "final": {"model.safetensors": 9}}')
    s3.put_object(Bucket=aws.BUCKET, Key=f"{key}/final/model.safetensors", Body=b"torn")
    assert submitted(cli, "third.yaml")
    s3.put_object(Bucket=aws.BUCKET, Key=f"{key}/final/model.safetensors", Body=b"nine byte")
    done = cli("sagemaker", "submit", "third.yaml", "--config", "settings.yaml", "--upload-data", *QUICK)
    assert done.code == 0 and "already complete" in done.err and not done.out


def test_nothing_travels_but_code_the_recipe_and_data_that_were_asked_for(here: Path, cli: Callable[..., Done]) -> None:
    for name in (".git/config", "runs/p/other/final/model.safetensors", ".aws/credentials", "secret.pem", "notes.txt", "__pycache__/a.pyc"):
        write(name, "private")
    before = set(aws.keys())
    submitted(cli, "recipe.yaml", "--set", "seed=5")
    new = {key for key in set(aws.keys()) - before if not key.startswith("azrecipe/jobs/")}
    (archive,) = [key for key in new if key.startswith("azrecipe/code/")]
    code = code_in(f"s3://{aws.BUCKET}/{archive}")
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "azrecipe").rglob("*") if file.is_file()}
    shipped = {
        f"azrecipe/_shipped/{file.relative_to(ROOT)}"
        for top in ("recipes", "schema", "accelerate_configs", "hardware", "sagemaker")
        for file in (ROOT / top).rglob("*")
    }
    own = {"sagemaker_entry.py", "job.json", "job/recipe.yaml", "requirements.txt", "constraints.txt"}
    assert set(code) <= files | shipped | own
    assert not [name for name in code if "__pycache__" in name or Path(name).name.startswith(".")]
    assert not [name for name in code if "/data/" in name.removeprefix("azrecipe/data/")]  # data; azrecipe/data/ is code
    assert {Path(key).name for key in new if key.startswith("azrecipe/data/")} <= {"text.txt", "heldout.txt"}
    assert not [key for key in new if not key.startswith(("azrecipe/code/", "azrecipe/data/"))]


def test_nothing_is_uploaded_twice(here: Path, cli: Callable[..., Done], account: str) -> None:
    with aws.refusing(
        account,
        "CreateTrainingJob",
        "ResourceLimitExceeded",
        "The account-level service limit 'ml.g5.8xlarge for training job usage' is 0 Instances.",
    ):
        done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--upload-data", *QUICK, "--set", "seed=77")
    assert done.code == 3
    last = done.err.strip().splitlines()[-1]
    assert "the account's quota does not allow it" in last and "Service Quotas" in last
    before = aws.keys()
    done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--upload-data", *QUICK, "--set", "seed=77")
    assert done.code == 0 and "0 files uploaded" in done.err
    assert not [key for key in set(aws.keys()) - set(before) if not key.startswith("azrecipe/jobs/")]
    write("text.txt", "other text " * 500)
    done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--upload-data", *QUICK, "--set", "seed=77")
    assert done.code == 0 and "1 file uploaded" in done.err


def test_a_dry_run_shows_all_and_sends_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*aws.CREDENTIALS, "AWS_PROFILE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody answers there
    line = [
        sys.executable,
        "-m",
        "azrecipe",
        "sagemaker",
        "submit",
        str(ROOT / "recipes/cpt_phase1.yaml"),
        "--config",
        str(ROOT / "sagemaker/cpt.yaml"),
        "--dry-run",
        "--json",
    ]
    done = called(line, project)
    assert done.code == 0, done.text
    (found,) = json.loads(done.out)
    assert found["request"]["ResourceConfig"] == {"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2, "VolumeSizeInGB": 500}
    assert found["request"]["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3DataType"] == "ManifestFile"
    assert found["plan"]["hours"]["middle"] > 0.1 and found["plan"]["processes"] == 16
    assert re.search(r"hours .* USD on demand at 50\.50 an hour", found["cost"])
    assert not found["account"]


def test_every_problem_of_the_settings_is_told_at_its_place(here: Path, cli: Callable[..., Done]) -> None:
    write("settings.yaml", "role: a role\ninstance_type: p4d\ninstance_count: 0\nspott: true\nmax_runtime_in_seconds: 30\n")
    done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--dry-run")
    assert done.code == 2
    found = done.err.splitlines()
    for place, text in [
        ("1:7", "a role's name"),
        ("2:16", "ml.p4d.24xlarge"),
        ("3:17", "at least 1"),
        ("4:1", "unknown key 'spott'"),
        ("5:25", "at least 600"),
        (":1:1", "bucket"),
    ]:
        assert any(place in line and text in line for line in found), (place, text, found)
    write(
        "settings.yaml",
        SETTINGS + "environment: {HF_TOKEN: hf_abcdefghijklmnopqrstuvwxyz}\nsubnets: [subnet-1]\nmax_wait_time_in_seconds: 700\n",
    )
    done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--dry-run")
    assert done.code == 2 and "hub_token_secret" in done.err and "security_group_ids" in done.err and "max_runtime_in_seconds" in done.err
    assert "hf_abc" not in done.text


def test_what_the_job_would_refuse_is_refused_here(here: Path, cli: Callable[..., Done]) -> None:
    def told(*more: str, settings: str = SETTINGS, upload: bool = True) -> str:
        write("settings.yaml", settings)
        done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", *QUICK, *(["--upload-data"] if upload else []), *more)
        assert done.code in (2, 3) and not done.out and "Traceback" not in done.text, done.text
        return done.err.strip()

    before = aws.keys()
    write("recipe.yaml", RECIPE.replace("precision: float32", "precision: bf16_mixed"))
    assert re.search(
        r"recipe\.yaml:\d+:\d+: .*precision: bf16_mixed is for GPUs, and ml.m5.xlarge has none",
        told("--instance-type", "ml.m5.xlarge"),
    )
    write("recipe.yaml", RECIPE)
    found = told(upload=False)
    assert "recipe.yaml:5:" in found and "upload_data: true" in found and len(found.splitlines()) == 2  # both files
    assert "there is no role nobody" in told(settings=SETTINGS.replace(aws.ROLE, "nobody"))
    assert f"aws s3 mb s3://none-{aws.ACCOUNT}" in told(settings=SETTINGS.replace("azrecipe-{account}-{region}", "none-{account}"))
    boto3.client("s3", region_name="eu-west-1").create_bucket(
        Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    both = told(settings=SETTINGS.replace("azrecipe-{account}-{region}", "far-away").replace(aws.ROLE, "nobody"))
    assert "far-away is in eu-west-1 and the job would run in us-east-1" in both and "there is no role nobody" in both
    assert "as in ml.p4d.24xlarge" in told("--instance-type", "p4d.24xlarge")
    assert "trn1" in told("--instance-type", "ml.trn1.32xlarge")
    assert "description looks like a secret" in told("--set", "description=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH")
    assert aws.keys() == before


def test_refusals_of_aws_are_one_line_each(here: Path, cli: Callable[..., Done], account: str) -> None:
    for code, message, said in [
        ("AccessDeniedException", "User: u is not authorized to perform: sagemaker:CreateTrainingJob", "docs/sagemaker.md has the policy"),
        ("ValidationException", "1 validation error detected", "AWS refuses: 1 validation error"),
        ("ExpiredTokenException", "The security token included in the request is expired", "log in again"),
    ]:
        with aws.refusing(account, "CreateTrainingJob", code, message):
            done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--upload-data", *QUICK)
        assert done.code in (2, 3) and said in done.err.strip().splitlines()[-1] and "Traceback" not in done.text, done.text


def test_money_is_not_spent_unasked(here: Path, cli: Callable[..., Done]) -> None:
    before = aws.keys()
    done = cli("sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--upload-data", "--no-check", "--no-plan")
    assert done.code == 2 and "--yes" in done.err
    asked: list[str] = []
    with pytest.raises(Exception, match="nothing was submitted"):
        sagemaker.submit(
            "recipe.yaml", "settings.yaml", check=False, plan=False, upload_data=True, ask=lambda text: bool(asked.append(text))
        )
    assert asked == ["Submit 1 job, price not known?"] and aws.keys() == before


def test_watching_a_job_and_bringing_its_run_here(here: Path, cli: Callable[..., Done], account: str, small_run: Path) -> None:
    name = submitted(cli)
    done = cli("sagemaker", "status", name)
    assert done.code == 0 and name in done.out and "p/recipe" in done.out
    assert name in [each["name"] for each in json.loads(cli("sagemaker", "status", "--json").out)]
    done = cli("sagemaker", "status", name[:-1])
    assert done.code == 2 and "did you mean" in done.err and name in done.err
    logs = boto3.client("logs")
    now, times = int(time.time() * 1000), {"one": 1, "two": 2, "three": 3}
    logs.create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")
    for host, lines in {"algo-1": ["one", "three"], "algo-2": ["two"]}.items():
        stream = {"logGroupName": "/aws/sagemaker/TrainingJobs", "logStreamName": f"{name}/{host}-1700000000"}
        logs.create_log_stream(**stream)
        logs.put_log_events(**stream, logEvents=[{"timestamp": now + times[line], "message": line} for line in lines])
    assert cli("sagemaker", "logs", name, "--follow").out.splitlines() == ["[algo-1] one", "[algo-2] two", "[algo-1] three"]
    s3 = boto3.client("s3")
    for file in small_run.rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), aws.BUCKET, f"azrecipe/runs/p/recipe/{file.relative_to(small_run)}")
    done = cli("sagemaker", "fetch", name)
    assert done.code == 0 and done.out.splitlines()[0] == "runs/p/recipe"
    assert not Path("runs/p/recipe/checkpoints").exists() and Path("runs/p/recipe/final/model.safetensors").exists()
    assert cli("report", "runs/p/recipe").code == 0 and Path("runs/p/recipe/report.html").stat().st_size > 10_000
    assert cli("sagemaker", "fetch", name, "--checkpoints").code == 0 and list(Path("runs/p/recipe/checkpoints").rglob("COMPLETE.json"))
    done = cli(
        "sagemaker", "submit", "recipe.yaml", "--config", "settings.yaml", "--upload-data", *QUICK, "--set", "phases[0].learning_rate=2e-3"
    )
    assert done.code == 2 and "holds the run of another recipe" in done.err and f"s3://{aws.BUCKET}/azrecipe/runs/p/recipe" in done.err
    assert cli("sagemaker", "stop", name).out.strip() == f"{name}: Completed"
    for key in aws.keys("azrecipe/runs/p/recipe/"):
        s3.delete_object(Bucket=aws.BUCKET, Key=key)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory that the recipe leaves."""
    folder = tmp_path_factory.mktemp("small")
    write(folder / "text.txt", "\n".join(tale * 20 for tale in TALES))
    write(folder / "heldout.txt", "The shepherd counted his sheep. Çoban qoyunlarını saydı. " * 4)
    write(folder / "recipe.yaml", RECIPE)
    line = [sys.executable, "-m", "azrecipe", "run", "recipe.yaml", "--set", "training.save_steps=2", "--set", "training.logging_steps=1"]
    done = called([*line, "--set", "training.eval_steps=2"], folder)
    assert done.code == 0, done.text
    return folder / "runs" / "p" / "recipe"


def test_cloudwatchs_expressions_find_every_metric_in_the_log_of_a_real_run(small_run: Path) -> None:
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    log = [cloudwatch_metrics.format_metrics_line(json.dumps(line)) for line in lines]
    found: dict[str, list[float]] = {}
    for each in cloudwatch_metrics.build_metric_definitions(load_recipe(small_run.parent.parent.parent / "recipe.yaml")):
        found[each["Name"]] = [float(match.group(1)) for line in log if line and (match := re.search(each["Regex"], line))]
    trained = [line for line in lines if "loss" in line]
    for name, key in [
        ("train:loss", "loss"),
        ("train:learning_rate", "learning_rate"),
        ("train:tokens_per_second", "tokens_per_second"),
        ("train:bits_per_byte", "train_bpb"),
        ("train:step", "step"),
    ]:
        known = lines if key == "step" else trained
        assert found[name] == pytest.approx([line[key] for line in known]), name
    assert found["train:peak_memory_gib"] == pytest.approx([line["peak_memory_bytes"] / 2**30 for line in trained], abs=1e-3)
    assert found["eval:bits_per_byte_target"] == [line["eval_target_bpb"] for line in lines if "eval_target_bpb" in line] != []


def test_a_pipeline_is_a_job_a_step_and_takes_what_the_last_one_left(here: Path, cli: Callable[..., Done], small_run: Path) -> None:
    write("first.yaml", RECIPE.replace("project: p", "project: q"))
    write(
        "second.yaml",
        RECIPE.replace("project: p", "project: q").replace(
            "tokenizer: {family: llama3, vocab_size: 320}", "tokenizer: {output_of: first.yaml}"
        ),
    )
    write("pipeline.yaml", "stage: pipeline\nproject: q\nsteps: [first.yaml, second.yaml]\n")
    write("settings.yaml", SETTINGS + "steps: {first.yaml: {instance_type: ml.g5.12xlarge, instance_count: 2}}\n")
    dry = sagemaker.requests("pipeline.yaml", "settings.yaml", plan=False, upload_data=True)
    assert [each["request"]["ResourceConfig"]["InstanceType"] for each in dry] == ["ml.g5.12xlarge", "ml.g5.8xlarge"]
    done = cli("sagemaker", "submit", "pipeline.yaml", "--config", "settings.yaml", "--upload-data", *QUICK)
    assert done.code == 2 and "this run is not complete" in done.err  # moto's jobs end at once, and leave nothing
    done = cli("sagemaker", "submit", "second.yaml", "--config", "settings.yaml", "--upload-data", *QUICK)
    assert done.code == 2 and "second.yaml takes from" in done.err and "submit it first" in done.err
    s3 = boto3.client("s3")
    for file in small_run.rglob("*"):
        if file.is_file() and file.name != "recipe.yaml":
            s3.upload_file(str(file), aws.BUCKET, f"azrecipe/runs/q/first/{file.relative_to(small_run)}")
    job = sagemaker.submit("pipeline.yaml", "settings.yaml", yes=True, check=False, plan=False, upload_data=True)
    assert job is not None and job.run_path == "q/second" and job.request is not None
    (source,) = [each["DataSource"]["S3DataSource"] for each in job.request["InputDataConfig"] if each["ChannelName"] == "run0"]
    assert source["S3DataType"] == "ManifestFile"
    listed = json.loads(s3.get_object(Bucket=aws.BUCKET, Key=source["S3Uri"].removeprefix(f"s3://{aws.BUCKET}/"))["Body"].read())
    assert (
        listed[0] == {"prefix": f"s3://{aws.BUCKET}/azrecipe/runs/q/first/"}
        and "final/model.safetensors" in listed
        and "status.json" in listed
    )
    assert not [name for name in listed[1:] if name.startswith("checkpoints")]
    boto3.client("s3").put_object(Bucket=aws.BUCKET, Key="azrecipe/runs/q/second/status.json", Body=b'{"state": "complete"}')
    done = cli("sagemaker", "submit", "pipeline.yaml", "--config", "settings.yaml", "--upload-data", *QUICK)
    assert done.code == 0 and done.err.count("already complete") == 2 and not done.out


def test_the_hubs_token_comes_from_secrets_manager(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azrecipe.sagemaker import container

    secrets = boto3.client("secretsmanager")
    secrets.create_secret(Name="plain", SecretString="hf_plain\n")
    secrets.create_secret(Name="named", SecretString=json.dumps({"user": "u", "HF_TOKEN": "hf_named"}))
    assert (container._read_secret("plain"), container._read_secret("named")) == ("hf_plain", "hf_named")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", aws.REGION)  # as a container may have it
    assert container._read_secret("plain") == "hf_plain"
    with pytest.raises(CannotRun, match="secretsmanager:GetSecretValue"):
        container._read_secret("nobody")
    with pytest.raises(CommandError, match="there is no secret nobody"):
        sagemaker.submit(
            "recipe.yaml", str(write("settings.yaml", SETTINGS + "hub_token_secret: nobody\n")), yes=True, check=False, plan=False
        )
    job = sagemaker.submit(
        "recipe.yaml",
        str(write("settings.yaml", SETTINGS + "hub_token_secret: plain\n")),
        yes=True,
        check=False,
        plan=False,
        upload_data=True,
    )
    assert job is not None and "hf_" not in json.dumps(job.request, default=str)


def test_the_notebook_runs(here: Path, account: str, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((ROOT / "notebooks" / "sagemaker.ipynb").read_text())
    write("sagemaker/mine.yaml", SETTINGS)
    scope: dict[str, Any] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(
                "".join(cell["source"])
                .replace("recipes/cpt_phase1.yaml", "recipe.yaml")
                .replace('"sagemaker/cpt.yaml"', '"sagemaker/mine.yaml", check=False, plan=False, upload_data=True'),
                scope,
            )
    assert scope["job"].run_path == "p/recipe" and "Completed" in capsys.readouterr().out


def test_the_containers_requirements_are_the_projects() -> None:
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {line.split(";")[0].strip() for line in known if not line.startswith("torch>")}
    lines = [line for line in (ROOT / "sagemaker/requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert set(lines) == wanted
    pins = [line for line in (ROOT / "sagemaker/constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins and set(pins) <= set((ROOT / "constraints.txt").read_text().splitlines())
    assert not [pin for pin in pins if pin.startswith("torch==")]  # submit adds the image's


@pytest.mark.parametrize(
    ("changes", "image", "pin"),
    [
        ({}, "huggingface-pytorch-training:2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04", "torch==2.9.0"),
        ({"instance_type": "ml.m7i.8xlarge"}, "pytorch-training:2.9-cpu-py312", "torch==2.9.0"),
        ({"pytorch_version": "2.13"}, "pytorch:2.13-cu133-amzn2023-sagemaker", "torch==2.13.0"),
        ({"training_image": "1.dkr.ecr/mine:1", "pytorch_version": "2.10"}, "1.dkr.ecr/mine:1", "torch==2.10.*"),
    ],
)
def test_each_image_has_its_torch(here: Path, changes: dict[str, str], image: str, pin: str) -> None:
    from azrecipe.sagemaker import training_job

    settings = replace(load_settings(here / "settings.yaml"), **changes)
    assert training_job._find_image(settings, "us-east-1").rpartition("amazonaws.com/")[2] == image
    assert settings.torch_pin == pin


def test_the_role_of_the_documentation_writes_no_code_and_no_data() -> None:
    text = (ROOT / "docs/sagemaker.md").read_text(encoding="utf-8")
    policy = json.loads(text.partition("training-policy.json <<END\n")[2].partition("\nEND\n")[0])
    bucket = "arn:aws:s3:::azrecipe-$ACCOUNT-$AWS_REGION"
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        if any(action.startswith(("s3:Put", "s3:Delete")) for action in actions):
            assert set(resources) == {f"{bucket}/azrecipe/{name}/*" for name in ("runs", "output", "tensorboard")}
        if "s3:ListBucket" in actions:
            assert statement["Condition"] == {"StringLike": {"s3:prefix": ["azrecipe", "azrecipe/*"]}}


def test_a_model_is_deployed_and_deleted(here: Path, llama: Path, cli: Callable[..., Done]) -> None:
    arguments = ("sagemaker", "deploy", llama, "--config", "settings.yaml", "--name", "azrecipe-llama", "--instance-type")
    said = json.loads(cli(*arguments, "ml.g5.2xlarge", "--dry-run", "--json").out)
    assert not aws.keys("azrecipe/models/") and "USD an hour" in said["cost"]
    model, configuration, endpoint = said["requests"].values()
    assert model["PrimaryContainer"]["Image"].endswith("amazonaws.com/djl-inference:0.38.0-lmi29.0.0-cu130")
    machine = "ml.g4dn.2xlarge"  # moto knows no newer GPU
    done = cli(*arguments, machine)
    assert done.code == 2 and "There is no terminal" in done.err and not aws.keys("azrecipe/models/")
    done = cli(*arguments, machine, "--yes")
    assert (done.code, done.out) == (0, "azrecipe-llama\n"), done.text
    assert "azrecipe sagemaker delete-endpoint azrecipe-llama --region us-east-1" in done.err
    root = model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"].removeprefix(f"s3://{aws.BUCKET}/")
    served = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert aws.keys(root) == {f"{root}{name}": (llama / name).stat().st_size for name in served}
    client = boto3.client("sagemaker")
    made = client.describe_endpoint(EndpointName="azrecipe-llama")
    assert made["EndpointConfigName"] == configuration["EndpointConfigName"] == endpoint["EndpointConfigName"]
    (variant,) = client.describe_endpoint_config(EndpointConfigName="azrecipe-llama")["ProductionVariants"]
    assert (variant["ModelName"], variant["InstanceType"]) == ("azrecipe-llama", machine)
    assert client.describe_model(ModelName="azrecipe-llama")["ExecutionRoleArn"] == f"arn:aws:iam::{aws.ACCOUNT}:role/{aws.ROLE}"
    done = cli("sagemaker", "delete-endpoint", "azrecipe-llama")
    assert done.out == "azrecipe-llama: deleted: endpoint, endpoint configuration, model\n", done.text
    assert not client.list_endpoints()["Endpoints"] and not client.list_models()["Models"]
    done = cli("sagemaker", "delete-endpoint", "azrecipe-llama")
    assert done.code == 2 and "there is no endpoint azrecipe-llama" in done.err


def test_a_deployment_that_fails_half_way_leaves_nothing(here: Path, account: str, llama: Path, cli: Callable[..., Done]) -> None:
    arguments = (
        "sagemaker",
        "deploy",
        llama,
        "--config",
        "settings.yaml",
        "--name",
        "azrecipe-no-quota",
        "--instance-type",
        "ml.g4dn.2xlarge",
        "--yes",
    )
    with aws.refusing(account, "CreateEndpoint", "ResourceLimitExceeded", "The account-level service limit is 0 Instances"):
        done = cli(*arguments)
    assert done.code == 3 and "Traceback" not in done.err
    assert (
        not boto3.client("sagemaker").list_models()["Models"] and not boto3.client("sagemaker").list_endpoint_configs()["EndpointConfigs"]
    )


def test_what_cannot_be_deployed_is_told_at_once(here: Path, llama: Path, cli: Callable[..., Done]) -> None:
    done = cli(
        "sagemaker",
        "deploy",
        llama,
        "--config",
        "settings.yaml",
        "--dry-run",
        "--name",
        "a b",
        "--instance-type",
        "g5",
        "--instance-count",
        "0",
    )
    assert done.code == 2 and all(option in done.err for option in ("--name: a b", "--instance-type: g5", "--instance-count: 0"))
    done = cli("sagemaker", "deploy", "nobody/nothing", "--config", "settings.yaml", "--dry-run")
    assert done.code == 2 and "only what is on this machine" in done.err


def test_a_container_with_another_torch_trains_nothing(tmp_path: Path) -> None:
    from importlib import metadata

    from azrecipe.errors import CannotRun
    from azrecipe.sagemaker import container

    version = metadata.version("torch").partition("+")[0]
    for pin in (version, f"{version.rpartition('.')[0]}.*"):
        container._check_torch(write(tmp_path / "constraints.txt", f"trl==1\ntorch=={pin}\n"))
    with pytest.raises(CannotRun, match=rf"torch {version}, and the job was made for 2\.0\.1"):
        container._check_torch(write(tmp_path / "constraints.txt", "torch==2.0.1\n"))


def test_outside_a_container_the_entry_point_says_so_in_a_line(
    here: Path, cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("sagemaker", "pack", "recipe.yaml", "--config", "settings.yaml", "--upload-data", "source").code == 0
    monkeypatch.setenv("SM_OUTPUT_FAILURE", str(here / "failure"))
    done = python("sagemaker_entry.py")
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 1
    assert (here / "failure").read_text() == done.stderr.strip() and "no container of a SageMaker training job" in done.stderr
