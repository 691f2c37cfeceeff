"""Liger asked for is Liger had: known by architecture before, by the live layers after, and equal to the plain ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import CannotRun, RecipeError
from azrecipe.modeling import liger_kernels
from azrecipe.recipe.load import load_recipe
from tests.conftest import ROOT, Done, write
from tests.small import called, environment

LIGER = """
stage: pretrain
project: p
model: {name_or_path: ./llama}
data: {datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}, max_length: 32}
phases: [{name: a, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 4}]
training: {global_batch_size: 2, per_device_train_batch_size: 2, precision: float32, use_liger_kernel: true}
"""
# Two of Liger's kernels need help under Triton's interpreter: Python floats reach SwiGLU's unwrapped, and libdevice's rsqrt gives None.
INTERPRETER = """
import numpy
import triton.language as tl
import triton.runtime.interpreter as interpreter
inner = interpreter._implicit_cvt
def convert(value):
    if type(value) is not float:
        return inner(value)
    return tl.tensor(interpreter.TensorHandle(numpy.array([value], numpy.float32), tl.float32), tl.float32)
interpreter._implicit_cvt = convert
import liger_kernel.ops.rms_norm
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
"""
EQUALITY = """
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from azrecipe.modeling import liger_kernels
config = AutoConfig.for_model("llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0)
names = ("rms_norm", "swiglu", "fused_linear_cross_entropy", "rope")
ids = torch.randint(1, 40, (2, 8), generator=torch.Generator().manual_seed(1))
labels = torch.where(torch.arange(16).view(2, 8) < 3, -100, ids)
places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])

def step(kernel):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if kernel is not None:
        apply_liger_kernel(model, {name: name == kernel for name in names})
    loss = model(input_ids=ids, labels=labels, position_ids=places, use_cache=False, num_items_in_batch=torch.tensor(12)).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, liger_kernels.list_active_kernels(model)

loss, grads, _ = step(None)
found = {}
for kernel in names:  # Liger's layers replace a module's classes, so each model has those of the models before it too
    its, its_grads, runs = step(kernel)
    furthest = max(((its_grads[name] - grad).norm() / grad.norm()).item() for name, grad in grads.items())
    found[kernel] = [kernel in runs, abs(its - loss) / loss, furthest]
print(json.dumps(found))
"""
LIVE = """
import json
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from azrecipe.modeling import liger_kernels
small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
build = lambda kind: AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
model = build("llama")
found = {"before": [liger_kernels.list_active_kernels(model), liger_kernels.list_missing_kernels(model, {"swiglu": False})]}
apply_liger_kernel(model, {"swiglu": False, "fused_linear_cross_entropy": False})
found["some"] = [liger_kernels.list_active_kernels(model), liger_kernels.list_missing_kernels(model, {"swiglu": False, "fused_linear_cross_entropy": False}), liger_kernels.list_missing_kernels(model, None)]
for kind in ("gemma3_text", "olmo2"):
    model = build(kind)
    apply_liger_kernel(model, None)
    found[kind] = [liger_kernels.list_active_kernels(model), liger_kernels.list_missing_kernels(model, None)]
print(json.dumps(found))
"""


def python(script: str, **changes: str) -> Any:
    """The JSON that a script prints last, in a process of its own: Liger replaces functions of transformers for a whole process."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    if not changes:
        done = called(command, ROOT)
        assert done.code == 0, done.err
        return json.loads(done.out.splitlines()[-1])
    alone = subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=300, check=False)
    assert alone.returncode == 0, alone.stderr
    return json.loads(alone.stdout.splitlines()[-1])


def test_an_architecture_or_a_kernel_that_liger_has_not_is_refused(project: Path) -> None:
    recipe = load_recipe(write("r.yaml", LIGER))
    liger_kernels.check_liger_kernels(recipe, "llama")
    with pytest.raises(CannotRun, match=r"no kernels for a gpt2.*use_liger_kernel=false"):
        liger_kernels.check_liger_kernels(recipe, "gpt2")
    recipe = load_recipe(write("r.yaml", LIGER.replace("float32,", "float32, liger_kernel_config: {geglu: true, rope: false},")))
    with pytest.raises(RecipeError, match=r"r\.yaml:\d+:\d+: Liger has no geglu for a llama\. It has: rope, rms_norm, swiglu"):
        liger_kernels.check_liger_kernels(recipe, "llama")
    liger_kernels.check_liger_kernels(recipe, "gemma")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("use_liger_kernel: false, liger_kernel_config: {rope: true}", "use_liger_kernel is not true"),
        ("use_liger_kernel: false, fused_linear_cross_entropy: liger", "one of Liger's kernels, and use_liger_kernel is not true"),
        ("liger_kernel_config: {cross_entropy: true, fused_linear_cross_entropy: true}", "compute the same loss"),
        ("fused_linear_cross_entropy: torch, liger_kernel_config: {fused_linear_cross_entropy: true}", "torch takes the loss"),
        ("fused_linear_cross_entropy: liger, liger_kernel_config: {fused_linear_cross_entropy: false}", "here it is left out"),
    ],
)
def test_kernels_that_exclude_each_other_are_refused(project: Path, cli: Callable[..., Done], keys: str, said: str) -> None:
    text = LIGER.replace(", use_liger_kernel: true", "") if "use_liger_kernel" in keys else LIGER
    write("r.yaml", text.replace("precision: float32", f"precision: float32, {keys}"))
    done = cli("validate", "r.yaml")
    assert done.code == 2
    assert "r.yaml:7:" in done.text
    assert said in done.text


def test_the_choice_that_reaches_transformers(project: Path) -> None:
    def chosen(keys: str) -> dict[str, bool] | None:
        return liger_kernels.choose_kernels(load_recipe(write("r.yaml", LIGER.replace("float32,", f"float32, {keys}"))).config.training)

    assert chosen("") is None
    assert chosen("liger_kernel_config: {rope: false},") == {"rope": False}
    assert chosen("fused_linear_cross_entropy: torch,") == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert chosen("fused_linear_cross_entropy: liger,") == {"cross_entropy": False, "fused_linear_cross_entropy": True}
    whole = chosen("liger_kernel_config: {cross_entropy: true},")
    assert whole == {"cross_entropy": True, "fused_linear_cross_entropy": False}  # both at once is an assertion in Liger


def test_what_runs_is_seen_on_the_live_model() -> None:
    found = python(LIVE)
    assert found["before"] == [[], ["rope", "rms_norm", "fused_linear_cross_entropy"]]
    assert found["some"] == [["rope", "rms_norm"], [], ["swiglu", "fused_linear_cross_entropy"]]
    assert found["gemma3_text"] == [["rope", "rms_norm", "geglu", "fused_linear_cross_entropy"], []]
    assert found["olmo2"] == [["rope", "rms_norm in 5 of 9", "swiglu", "fused_linear_cross_entropy"], []]  # not those of queries and keys


def test_the_kernels_equal_the_plain_layers() -> None:
    """Loss and all gradients, through Triton's interpreter; documents' positions restart, and labels are left out."""
    found = python(INTERPRETER + EQUALITY, TRITON_INTERPRET="1")
    assert list(found) == ["rms_norm", "swiglu", "fused_linear_cross_entropy", "rope"]
    for kernel, (runs, loss, gradient) in found.items():
        assert runs, kernel
        assert loss < 1e-6, kernel
        assert gradient < 2e-6, kernel
