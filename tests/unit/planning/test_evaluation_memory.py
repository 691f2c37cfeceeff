"""The memory of a measurement, by its formula, beside what PyTorch allocates in one."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from azrecipe.evaluation.token_losses import ROWS_PER_CHUNK, compute_token_losses
from azrecipe.planning import evaluation_memory
from azrecipe.planning.evaluation_memory import compute_evaluation_budget
from azrecipe.planning.simulation.step_simulation import measure_step
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.planning.training_loops import PlannedLoop

SHAPE = {
    "vocab_size": 8000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def measure_peak(model: torch.nn.Module, batch: int, length: int) -> int:
    """The most bytes that are allocated at once while a batch is scored."""
    ids = torch.randint(8000, (batch, length))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute_token_losses(model, ids, ids)
    live = peak = 0
    kineto = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("batch", "length"), [(8, 256), (4, 64)])
def test_the_formula_covers_what_a_measurement_allocates(batch: int, length: int) -> None:
    assert evaluation_memory.LOGIT_ROWS == ROWS_PER_CHUNK
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).eval()
    step = StepSpec(config={"model_type": "llama", **SHAPE}, precision="float32", cuda=False)
    loop = PlannedLoop("full", step, length, 1, 1, 8, eval_batch=batch)
    budget = compute_evaluation_budget(measure_step(step, length), loop, 1)
    assert budget is not None
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert budget.parts["weights"] == pytest.approx(weights, rel=0.01)
    assert budget.parts["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    transient, measured = budget.parts["activations"] + budget.parts["logits and loss"], measure_peak(model, batch, length)
    assert measured <= transient
    assert measured > evaluation_memory.LEAST_SHARE * transient
    whole_logits = batch * (length - 1) * 8000 * 4
    assert batch == 4 or measured < whole_logits


def test_what_is_not_measured_has_no_budget() -> None:
    step = StepSpec(config={"model_type": "llama", **SHAPE}, precision="float32", cuda=False)
    assert compute_evaluation_budget(measure_step(step, 64), PlannedLoop("sft", step, 64, 1, 1, 8), 1) is None
