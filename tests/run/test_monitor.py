"""What a user sees of a run: its progress, metrics.jsonl, TensorBoard, a profile of a few steps."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.modeling.flops import flops_per_token
from azrecipe.tokenization.tokenizer import load_tokenizer
from azrecipe.training import throughput
from azrecipe.training.profiling import group_fused_kernels
from tests.conftest import Done, write
from tests.small import BASE, SFT, Project, fill

SEEN = """
stage: pretrain
extends: base.yaml
phases:
  - {name: short, trainable_parameters: [embeddings], learning_rate: 1e-3, max_steps: 2}
  - {name: long, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 6}
training: {fused_linear_cross_entropy: torch, profile: {start_step: 3, steps: 2}, report_to: [tensorboard], eval_steps: 3, logging_steps: 2}
"""


@pytest.fixture
def small(tmp_path: Path) -> Project:
    """The small project, nothing trained yet."""
    return fill(tmp_path)


def lines(project: Project, recipe: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.path(recipe) / "metrics.jsonl").read_text().splitlines()]


def scalars(project: Project, recipe: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) of each tag, in the order written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((project.path(recipe) / "tensorboard").glob("*/*"), key=lambda f: f.name):  # a folder a phase, the time in the name
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_a_run_is_seen_everywhere_alike(small: Project) -> None:
    """Progress, metrics.jsonl, TensorBoard and the profile of one run with the chunked loss, two phases long."""
    write(small.folder / "seen.yaml", SEEN)
    printed = small.run("seen")
    logged = lines(small, "seen")
    trained = [line for line in logged if "loss" in line and line["phase"] == "long"]
    assert [line["step"] for line in trained] == [1, 2, 4, 6]

    # Training BPB: what the labels of these steps cost, over the bytes of the text that they were read from
    nats_a_byte = trained[2]["loss"] * 512 / (trained[2]["bytes"] - trained[1]["bytes"])  # 512 tokens, less BOS and first ones
    assert 0.9 * nats_a_byte < trained[2]["train_bpb"] * math.log(2) < nats_a_byte
    tokenizer = load_tokenizer(str(small.path("seen") / "final"))
    texts = [json.loads(line)["text"] for line in (small.folder / "held.jsonl").read_text().splitlines()]
    fertility = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts) / sum(len(t.split()) for t in texts)
    for line in trained:
        assert line["tokens_per_second"] / line["target_words_per_second"] == pytest.approx(fertility, rel=0.02)
        assert "mfu" not in line or torch.cuda.is_available()

    assert f"loss {trained[3]['loss']:.3f}  BPB {trained[3]['train_bpb']:.3f}" in printed
    assert "words/s" in printed
    assert "left" in printed
    measured = [line for line in logged if "eval_target_bpb" in line and line["phase"] == "long"]
    assert f"3/6  bits per byte: target {measured[0]['eval_target_bpb']:.3f}, english {measured[0]['eval_english_bpb']:.3f}" in printed

    shown = scalars(small, "seen")
    for key in ("loss", "train_bpb", "tokens_per_second", "target_words_per_second"):
        values = [line[key] for line in logged if "loss" in line]
        assert [value for _, value in shown[f"train/{key}"]] == pytest.approx(values, rel=1e-5), key
    values = [line["eval_target_bpb"] for line in logged if "eval_target_bpb" in line]
    assert [value for _, value in shown["eval/target_bpb"]] == pytest.approx(values, rel=1e-5)

    folder = small.path("seen") / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["long.trace.json.gz", "long.txt"]
    assert "too short for step 3, so not recorded: short (2 steps)" in printed
    table = (folder / "long.txt").read_text()
    assert table.startswith("long, steps 3 to 4\n")
    assert "PyTorch's chunked loss: torch_nn::_linear_cross_entropy_batch_chunked" in table
    assert "Liger: none" in table
    names = {event["name"] for event in json.loads(gzip.decompress((folder / "long.trace.json.gz").read_bytes()))["traceEvents"]}
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2


def test_sft_is_profiled_and_shown_too(small: Project, llama: Path) -> None:
    text = SFT.replace("output_of: cpt.yaml", f"name_or_path: {llama}").replace("max_steps: 12", "max_steps: 3")
    write(small.folder / "sft.yaml", text.replace("precision:", "report_to: [tensorboard], profile: {start_step: 1, steps: 1}, precision:"))
    small.run("sft")
    assert (small.path("sft") / "profile" / "sft.txt").read_text().startswith("sft, step 1\n")
    shown = scalars(small, "sft")
    assert [step for step, _ in shown["train/tokens_per_second"]] == [1, 2, 3]
    assert "train/train_bpb" not in shown  # conversations are no text with bytes


def test_what_cannot_be_recorded_or_chunked_is_refused_before_it_trains(small: Project) -> None:
    late = "stage: pretrain\nextends: base.yaml\ntraining: {profile: {start_step: 21}}\n"
    write(small.folder / "late.yaml", late)
    assert "late.yaml:3:34: no loop has a step 21, so nothing would be recorded: english (20 steps)" in small.run("late", code=2)
    granite = BASE.replace("model_type: llama", "model_type: granite, logits_scaling: 8.0")
    write(small.folder / "granite.yaml", granite.replace("precision:", "fused_linear_cross_entropy: torch, precision:"))
    said = small.run("granite", code=2)
    assert "PyTorch's chunked loss: a granite scales or caps its logits between head and loss" in said
    assert "granite.yaml:" in said
    assert not small.path("granite").exists()


def test_sft_leaves_the_fused_loss_to_trl(project: Path, cli: Callable[..., Done]) -> None:
    text = SFT.replace("{output_of: cpt.yaml}", "{name_or_path: ./llama}")
    keys = "use_liger_kernel: true, liger_kernel_config: {fused_linear_cross_entropy: true}, precision:"
    write("r.yaml", text.replace("precision:", keys))
    assert "TRL's SFTTrainer takes the loss a chunk at a time by itself" in cli("validate", "r.yaml").text


def test_fused_kernels_are_known_by_name() -> None:
    found = group_fused_kernels(
        ["aten::mm", "_rms_norm_forward_kernel", "LigerSiLUMulFunction", "void pytorch_flash::flash_fwd_kernel<...>", "aten::_fused_adamw_"]
    )
    assert found["Liger"] == ["LigerSiLUMulFunction", "_rms_norm_forward_kernel"]
    assert found["flash attention"] == ["void pytorch_flash::flash_fwd_kernel<...>"]
    assert found["fused optimizer"] == ["aten::_fused_adamw_"]
    assert not found["PyTorch's chunked loss"]


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Quadro P6000", None),
    ],
)
def test_a_chips_peak_is_found_by_its_name(device: str, tflops: float | None) -> None:
    assert throughput.get_peak_flops(device) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_the_flops_of_a_token_follow_what_trains() -> None:
    """Of Llama 3.2 1B at 2,048 tokens: 6 N + 12 L H Q T with all of it, as in PaLM's appendix B; less with a frozen backbone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                head_dim=64, vocab_size=128_256, tie_word_embeddings=True,
            )
        )  # fmt: skip
    layers, head = 973_078_528, 2048 * 128_256
    attention = 4 * 16 * 2048 * 2048

    def flops(*trains: str) -> float | None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in trains))
        return flops_per_token(model, 2048)

    assert flops("") == 6 * (layers + head) + 3 * attention
    assert flops("embed_tokens") == 4 * layers + 6 * head + 3 * attention
    upper = flops(*(f"layers.{n}." for n in range(8, 16)))  # nothing goes back through the lower half
    assert upper == pytest.approx((2 + 4 / 2) * layers + 4 * head + attention * (1 + 2 / 2), rel=0.005)
