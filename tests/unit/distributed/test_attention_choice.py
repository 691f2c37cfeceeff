"""What `auto` stands for on each device, and what a named attention is refused for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from azrecipe.distributed.attention_choice import AttentionDevice, AttentionUse, choose_attention, find_obstacle
from azrecipe.distributed.requirements import find_launcher_problem
from azrecipe.errors import CannotRun
from azrecipe.runs.run_attention import read_earlier_attention
from tests.conftest import write

CPU, A100, T4 = AttentionDevice(), AttentionDevice("A100", (8, 0)), AttentionDevice("T4", (7, 5))
PACKED = AttentionUse("pretrain", "bf16_mixed", packed=True)


@pytest.mark.parametrize(
    ("use", "device", "name", "reason"),
    [
        (PACKED, A100, "varlen", "without masks"),
        (AttentionUse("pretrain", "bf16_pure", packed=True), A100, "varlen", "without masks"),
        (PACKED, CPU, "sdpa", "no GPU"),
        (PACKED, T4, "sdpa", "compute capability 7.5"),
        (PACKED, AttentionDevice("A100", (8, 0), has_varlen=False), "sdpa", "torch 2.10 or newer"),
        (AttentionUse("pretrain", "float32", packed=True), A100, "sdpa", "bfloat16 only"),
        (AttentionUse("pretrain", "bf16_mixed"), A100, "sdpa", "packed documents"),
        (AttentionUse("sft", "bf16_mixed", packed=True), A100, "sdpa", "pretraining"),
        (AttentionUse("evaluate", "bfloat16"), A100, "sdpa", "pretraining"),
        (AttentionUse("pretrain", "bf16_mixed", True, 2), A100, "sdpa", "split over processes"),
        (AttentionUse("pretrain", "bf16_mixed", True, obstacles={"varlen": "a sliding window"}), A100, "sdpa", "a sliding window"),
        (AttentionUse("pretrain", "bf16_mixed", True, obstacles={"varlen": "x", "sdpa": "a soft cap"}), A100, "eager", "x"),
        (AttentionUse("pretrain", "bf16_mixed", True, default="eager"), CPU, "eager", "no GPU"),
    ],
)
def test_auto_takes_varlen_where_it_can_be(use: AttentionUse, device: AttentionDevice, name: str, reason: str) -> None:
    choice = choose_attention("auto", use, device)
    assert choice.name == name
    assert reason in choice.reason


def test_a_run_that_goes_on_keeps_its_attention_where_it_can() -> None:
    assert choose_attention("auto", PACKED, A100, "sdpa").name == "sdpa"
    assert choose_attention("auto", PACKED, A100, "varlen").name == "varlen"
    assert choose_attention("auto", PACKED, T4, "varlen").name == "sdpa"
    assert choose_attention("varlen", PACKED, A100, "sdpa").name == "varlen"


@pytest.mark.parametrize(
    ("name", "use", "device", "reason"),
    [
        ("varlen", AttentionUse("pretrain", "float32"), A100, "it computes in bfloat16 only, and precision: float32"),
        ("varlen", PACKED, T4, "a T4 has compute capability 7.5, and FlashAttention needs 8.0 or newer"),
        ("varlen", AttentionUse("evaluate", "bfloat16"), A100, "a mask"),
        ("varlen", AttentionUse("pretrain", "bf16_mixed", obstacles={"varlen": "a window"}), A100, "a window"),
        ("flex_attention", PACKED, CPU, "no backward pass of it on a CPU"),
        ("flash_attention_2", AttentionUse("sft", "bf16_pure", obstacles={"flash": "not supported"}), A100, "not supported"),
        ("kernels-community/flash-attn2", AttentionUse("sft", "bf16_pure", obstacles={"flash": "not supported"}), A100, "not supported"),
    ],
)
def test_a_named_attention_that_cannot_run_is_refused_with_the_reason(
    name: str, use: AttentionUse, device: AttentionDevice, reason: str
) -> None:
    with pytest.raises(CannotRun, match=r"What runs here: --set (model\.)?attn_implementation=auto") as error:
        choose_attention(name, use, device)
    assert f"attn_implementation: {name}: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("kernels") is not None, reason="the package kernels is installed")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash_attention_2", "flash-attn, or kernels"),
        ("flash_attention_3", "flash-attn-3, or kernels"),
        ("kernels-community/flash-attn2", "pip install kernels"),
    ],
)
def test_a_missing_package_is_named(name: str, words: str) -> None:
    assert words in find_obstacle(name, PACKED, A100)


def test_an_earlier_start_says_what_it_took(tmp_path: Path) -> None:
    assert read_earlier_attention(tmp_path) is None
    write(tmp_path / "recipe.yaml", "stage: pretrain\nmodel: {name_or_path: ./llama, attn_implementation: auto}\n")
    assert read_earlier_attention(tmp_path) is None
    write(tmp_path / "recipe.yaml", "stage: pretrain\nmodel: {name_or_path: ./llama, attn_implementation: sdpa}\n")
    assert read_earlier_attention(tmp_path) == "sdpa"  # written before environment.json said it
    write(tmp_path / "environment.json", json.dumps({"azrecipe": "1", "attn_implementation": "varlen"}))
    assert read_earlier_attention(tmp_path) == "varlen"


def test_what_triton_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert find_launcher_problem().startswith("a C compiler, and there is no no-such-compiler here")
    write(tmp_path / "cc", "#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert find_launcher_problem(str(tmp_path)).startswith(f"Python's headers, and there is no {tmp_path}/Python.h")
    write(tmp_path / "Python.h", "")
    assert find_launcher_problem(str(tmp_path)) == ""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in find_obstacle("flex_attention", AttentionUse("evaluate", "float32"), CPU)
