"""Every backend for real on CPU: sharded, the same losses as one process, resumed by another number of processes, saved whole."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from azrecipe.distributed.backend import Backend, backend_from_env
from azrecipe.errors import CommandError
from azrecipe.training import checkpoints
from azrecipe.utils.atomic_files import read_json, write_json
from tests.conftest import write
from tests.small import Project, copied, weights

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
# Accumulation, gradients summed after every batch, activation checkpointing, measurements between steps and checkpoints beside them
EVERYTHING = (
    "--set",
    "training.per_device_train_batch_size=2",
    "--set",
    "training.activation_checkpointing=true",
    "--set",
    "training.eval_steps=5",
    "--set",
    "training.sync_each_batch=true",
    "--set",
    "training.async_sharded_checkpoints=true",
)

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
CLOSE = 5e-6  # a loss near 5 in float32: what is summed over processes is summed in another order
QUICK = """
stage: pretrain
extends: cpt.yaml
phases: [{name: full, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 4}]
training: {save_steps: 4}
"""


def lines(project: Project, recipe: str = "cpt") -> list[dict[str, Any]]:
    text = (project.path(recipe) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if "loss" in line]


def assert_same_training(project: Project, finished: Project, first: int = 0) -> None:
    """Losses, norms before clipping (max_grad_norm 1, and most are above it), BPB and the final model are one process'."""
    mine, theirs = lines(project), lines(finished)
    assert [(line["phase"], line["step"]) for line in mine] == [(line["phase"], line["step"]) for line in theirs]
    for a, b in zip(mine[first:], theirs[first:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=CLOSE)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    left, right = weights(project.path("cpt") / "final"), weights(finished.path("cpt") / "final")
    assert left.keys() == right.keys()
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-5
    for name, bpb in finished.result("cpt")["bpb"].items():
        assert bpb == pytest.approx(project.result("cpt")["bpb"][name], abs=2e-5)


def opens(folder: Path) -> None:
    """A saved model is one for plain transformers: no weight is missing, and it predicts."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """For each float tensor of an FSDP checkpoint with more than one row: pieces that it lies in, and its rows."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: (len(tensor.chunks), tensor.size[0])
        for name, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata) and tensor.size and tensor.size[0] > 1
    }


def terminate_one(project: Project, *arguments: str, steps: int) -> int:
    """Run cpt, send SIGTERM to its second process after so many logged steps, and return the exit code of azrecipe run."""
    log = project.path("cpt") / "metrics.jsonl"
    process = project.started("cpt", *arguments, printed=project.folder / "printed.txt")
    try:
        while process.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < steps):
            time.sleep(0.005)
        (launcher,) = psutil.Process(process.pid).children()
        _, second = sorted(launcher.children(), key=lambda child: child.pid)  # in the order of their ranks
        os.kill(second.pid, signal.SIGTERM)
        return process.wait()
    finally:
        process.send(signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """FSDP on two processes with accumulation, activation checkpointing and measurements between steps, stopped by a SIGTERM to one of them. Only read it."""
    project = copied(finished, tmp_path_factory.mktemp("stopped"))
    assert terminate_one(project, "--accelerate-config", "fsdp", "--num-processes", "2", *EVERYTHING, steps=11) == 143
    return project


@pytest.fixture
def resumable(stopped: Project, tmp_path: Path) -> Project:
    """A copy of the stopped run to go on with."""
    return Project(Path(shutil.copytree(stopped.folder, tmp_path / "project")))


def newest(project: Project) -> Path:
    found = checkpoints.find_last_complete(project.path("cpt") / "checkpoints" / "full")
    assert found is not None
    return found


def test_a_signal_to_one_process_saves_once_together_and_writes_no_final_model(stopped: Project, finished: Project) -> None:
    assert stopped.status("cpt")["state"] == "interrupted"
    assert stopped.status("cpt")["exit_code"] == 143
    assert not (stopped.path("cpt") / "final").exists()
    printed = (stopped.folder / "printed.txt").read_text()
    assert printed.count("a checkpoint is saved") == 1
    assert "Traceback" not in printed
    assert "fsdp2, 2 processes" in printed
    done = lines(stopped)
    assert checkpoints.get_step(newest(stopped)) == done[-1]["step"]
    for a, b in zip(done, lines(finished), strict=False):
        assert a["loss"] == pytest.approx(b["loss"], abs=CLOSE)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_weights_and_optimizer_state_lie_in_the_checkpoint_in_two_parts(stopped: Project) -> None:
    parameters, states = shards(newest(stopped) / "pytorch_model_fsdp_0"), shards(newest(stopped) / "optimizer_0")
    assert set(parameters.values()) and {pieces for pieces, _ in parameters.values()} == {2}
    moments = {name: found for name, found in states.items() if "exp_avg" in name}
    assert len(moments) >= 2 * len(parameters) - 2  # two moments a weight; the tied matrix is named twice among the weights
    assert {pieces for pieces, _ in moments.values()} == {2}
    assert read_json(newest(stopped) / checkpoints.BACKEND_FILE) == {"kind": "fsdp2", "processes": 2, "format": "SHARDED_STATE_DICT"}


@pytest.mark.parametrize(("config", "processes"), [("hsdp", 4), ("fsdp", 1)])
def test_an_fsdp_checkpoint_goes_on_with_other_processes(resumable: Project, finished: Project, config: str, processes: int) -> None:
    extra = ("--set", "training.per_device_train_batch_size=1", "--set", "training.save_total_limit=9")
    printed = resumable.run("cpt", "--accelerate-config", config, "--num-processes", str(processes), *extra)
    assert "going on from" in printed
    assert f"({'hsdp' if config == 'hsdp' else 'fsdp2'}, {processes} process" in printed
    assert_same_training(resumable, finished)
    opens(resumable.path("cpt") / "final")
    pieces = {count for name, (count, _) in shards(newest(resumable) / "optimizer_0").items() if "exp_avg" in name}
    assert pieces == {2 if config == "hsdp" else 1}  # a replica's shards are written once


def test_a_checkpoint_of_another_kind_is_refused_before_training_in_words(resumable: Project) -> None:
    before = newest(resumable)
    printed = resumable.run("cpt", code=2)
    assert "was written by fsdp2 with 2 processes, and single with 1 cannot go on from it" in printed
    assert "--accelerate-config fsdp or hsdp" in printed
    assert "Traceback" not in printed
    assert newest(resumable) == before
    assert resumable.status("cpt")["state"] == "interrupted"


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_zero_trains_the_model_that_one_process_trains(small: Project, finished: Project, stage: int) -> None:
    printed = small.run("cpt", "--accelerate-config", f"zero{stage}", "--num-processes", "2", *EVERYTHING)
    assert f"zero{stage}, 2 processes" in printed
    assert "built successfully" not in printed  # DeepSpeed compiles nothing
    assert "phase full: trains 31,392 of 31,392" in printed
    assert_same_training(small, finished)
    opens(small.path("cpt") / "final")
    total = sum(tensor.numel() for tensor in weights(small.path("cpt") / "final").values())
    files = sorted(newest(small).glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
    assert len(files) == 2
    for file in files:
        found = torch.load(file, weights_only=False)["optimizer_state_dict"]
        states = found["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
        held = sum(tensor.numel() for state in states.values() for name, tensor in state.items() if name == "exp_avg")
        assert total / 2 <= held < total / 2 + 1000  # a half, padded


@pytest.mark.parametrize(
    ("written", "reads", "refuses"),
    [
        (Backend("ddp", 2, 0), [Backend("single", 1, 0), Backend("ddp", 4, 0)], [Backend("fsdp2", 2, 0), Backend("zero2", 2, 0)]),
        (Backend("fsdp2", 2, 0), [Backend("hsdp", 4, 0, 2), Backend("fsdp2", 1, 0)], [Backend("ddp", 2, 0), Backend("zero3", 2, 0)]),
        (Backend("zero2", 2, 0), [Backend("zero2", 2, 0)], [Backend("zero2", 4, 0), Backend("zero3", 2, 0), Backend("single", 1, 0)]),
    ],
    ids=["ddp", "fsdp", "zero"],
)
def test_who_can_go_on_from_a_checkpoint(tmp_path: Path, written: Backend, reads: list[Backend], refuses: list[Backend]) -> None:
    folder = tmp_path / "full" / "checkpoint-4"
    write(folder / "weights", "w")
    checkpoints.finalize(folder, written)
    for backend in reads:
        checkpoints.check_readable(tmp_path, backend)
    for backend in refuses:
        with pytest.raises(CommandError, match=f"written by {written.strategy} with {written.world_size} process"):
            checkpoints.check_readable(tmp_path, backend)


def test_a_checkpoint_from_before_backends_were_written_down_is_one_process_or_ddp(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    write(folder / "weights", "w")
    write_json(folder / checkpoints.MARKER, {"weights": 1})
    checkpoints.check_readable(tmp_path, Backend("ddp", 2, 0))
    with pytest.raises(CommandError):
        checkpoints.check_readable(tmp_path, Backend("fsdp2", 2, 0))


def test_a_ddp_checkpoint_goes_on_in_one_process(small: Project, finished: Project) -> None:
    assert terminate_one(small, "--num-processes", "2", steps=11) == 143
    assert not (small.path("cpt") / "final").exists()
    assert "going on from" in small.run("cpt")
    assert_same_training(small, finished)


def test_pure_bfloat16_is_pure_when_sharded_and_trains_alike(small: Project) -> None:
    """bfloat16 has 8 bits: losses agree to 2 %, and no weight or moment is kept in anything wider."""
    write(small.folder / "quick.yaml", QUICK)
    pure = ("--set", "training.precision=bf16_pure")
    small.run("quick", *pure)
    one = small.losses("quick")
    shutil.rmtree(small.path("quick"))
    small.run("quick", *pure, "--accelerate-config", "fsdp", "--num-processes", "2")
    assert small.losses("quick") == pytest.approx(one, rel=0.02)
    assert {tensor.dtype for tensor in weights(small.path("quick") / "final").values()} == {torch.bfloat16}
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(small.path("quick") / "checkpoints/full/checkpoint-4/optimizer_0").read_metadata().state_dict_metadata
    assert {t.properties.dtype for name, t in stored.items() if "exp_avg" in name} == {torch.bfloat16}


@pytest.mark.long
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_trains_alike_and_its_checkpoint_is_a_plain_one(small: Project, finished: Project) -> None:
    """Stopped compiled and ended plain: the names in the checkpoint are the model's own."""
    compiled = ("--set", "training.torch_compile=true", "--set", "training.activation_checkpointing={every_n_layers: 2}")
    code = small.interrupt("phase1", lambda run: any(run.glob("checkpoints/*/*/" + checkpoints.MARKER)), signal.SIGTERM, *compiled)
    assert code == 143
    (found,) = checkpoints.list_complete(small.path("phase1") / "checkpoints" / "embeddings")[-1:]
    assert "model.embed_tokens.weight" in weights(found)
    before = len(lines(small, "phase1"))
    assert before >= 4
    assert "going on from" in small.run("phase1")
    assert small.losses("phase1") == pytest.approx(finished.losses("cpt")[:8], abs=1e-5)
    assert weights(small.path("phase1") / "final").keys() == weights(finished.path("cpt") / "final").keys()


def test_torch_compile_without_a_compiler_is_refused(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "torch_compile: true needs a compiler" in small.run("cpt", "--set", "training.torch_compile=true", code=3)
    assert not small.path("cpt").exists()


def test_accelerate_still_calls_processes_without_an_accelerator_undistributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, azrecipe.distributed.cpu_backend._patch_accelerate_gloo may be unnecessary."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    monkeypatch.setenv("LOCAL_RANK", "0")
    assert PartialState._prepare_backend(object(), False, False, "gloo") == ("gloo", DistributedType.NO)
    assert PartialState._prepare_backend(object(), False) == (None, DistributedType.NO)


@needs_deepspeed
def test_deepspeed_still_builds_an_operator_when_it_starts_on_a_cpu() -> None:
    """Where this fails, azrecipe.distributed.cpu_backend._patch_deepspeed_compilation may be unnecessary."""
    found = importlib.util.find_spec("deepspeed")
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "comm" / "torch.py").read_text()
    assert "self.shm_comm_op = build_shm_op()" in source
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in source


FSDP = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
MESH = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}

SPLIT = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "backend"),
    [
        ({}, Backend("single", 1, 0)),
        (FSDP, Backend("fsdp2", 8, 0)),
        ({**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "-1"}, Backend("hsdp", 8, 0, 2)),
        ({**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, Backend("hsdp", 8, 0, 2)),
        ({**FSDP, "FSDP_VERSION": "1"}, "only FSDP 2"),
        ({**MESH, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}, "replicates over 2 and shards over 8 processes, and 8 are started"),
        ({**MESH, "WORLD_SIZE": "7", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "-1"}, "7 do not divide"),
        ({**FSDP, **SPLIT, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "-1"}, Backend("fsdp2", 8, 0, 1, 2)),
        ({**FSDP, **SPLIT, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, Backend("fsdp2", 8, 0, 1, 2)),
        (
            {**FSDP, **SPLIT, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"},
            "splits sequences over 2 and shards over 8 processes, and 8 are started",
        ),
        ({**MESH, "PARALLELISM_CONFIG_CP_SIZE": "2"}, "not verified: dp_replicate_size 1"),
        ({**MESH, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "tensor and sequence parallelism are not supported"),
        ({**FSDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, "training.precision decides"),
    ],
)
def test_what_a_launcher_asked_for(environment: dict[str, str], backend: Backend | str) -> None:
    if isinstance(backend, Backend):
        assert backend_from_env(environment) == backend
    else:
        with pytest.raises(CommandError, match=backend):
            backend_from_env(environment)
