"""How much card memory a measurement on held-out text needs. No torch.

It is computed from a formula, not simulated: what is at rest between steps, the widest layer's tensors of one forward pass without
gradients, and a part of the logits.
"""

from __future__ import annotations

from dataclasses import replace

from azrecipe.planning.memory_budget import VERDICTS, MemoryBudget, build_memory_budget
from azrecipe.planning.simulation.step_cost import StepCost
from azrecipe.planning.training_loops import PlannedLoop

LOGIT_ROWS = 512  # rows of logits in memory at once: evaluation/token_losses.py
LOGIT_COPIES = 2  # float32 tensors of a part's logits beside the head's output
HIDDEN_COPIES = 6  # tensors as wide as the hidden state that a layer holds at once: residual, norm, query, key, value, output
LEAST_SHARE = 0.4  # of the formula's tensors: what a measurement surely needs (tests/unit/planning/test_evaluation_memory.py)
FEED_FORWARD_COPIES = 3  # gate, up, and their product


def compute_evaluation_budget(cost: StepCost, loop: PlannedLoop, world_size: int, context_parallel_size: int = 1) -> MemoryBudget | None:
    """Compute the memory of a measurement between two steps; None without one.

    Args:
        cost: The simulated step.
        loop: The loop, with its evaluation batch.
        world_size: Processes.
        context_parallel_size: Processes that share a sequence in training; each measures whole ones.
    """
    if not loop.eval_batch:
        return None
    step, config = loop.step, loop.step.config
    at_rest = cost.get_peak_memory(1, world_size if step.uses_fsdp else None)
    width = 4 if step.precision == "float32" else 2
    uses_autocast = step.precision == "bf16_mixed" and not step.uses_fsdp
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    intermediate = int(config.get("intermediate_size") or 4 * hidden)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    tokens = loop.eval_batch * loop.length * context_parallel_size
    layer = tokens * (HIDDEN_COPIES * hidden * (4 if uses_autocast else width) + FEED_FORWARD_COPIES * intermediate * width)
    parameters = cost.parameters
    gathered = parameters.embeddings + 2 * (parameters.total - parameters.embeddings) / layers if step.uses_fsdp else 0
    parts = {
        "weights": at_rest["weights"],
        "optimizer": at_rest["optimizer"],
        "buffers": at_rest["buffers"],
        "activations": float(layer),
        "logits and loss": float(min(LOGIT_ROWS, tokens) * cost.head.vocab_size * (width + 4 * LOGIT_COPIES)),
        "communication": gathered * width,
        "temporary": parameters.trainable * 2.0 if uses_autocast else 0.0,  # autocast keeps a bfloat16 copy of every weight that trains
    }
    budget = build_memory_budget(parts, world_size)
    return replace(budget, lower_bound=budget.lower_bound - (1 - LEAST_SHARE) * (parts["activations"] + parts["logits and loss"]))


def get_verdict(training: MemoryBudget, evaluation: MemoryBudget | None, card_bytes: float) -> str:
    """Return the verdict of a loop: the worse of steps and measurements."""
    budgets = [training] if evaluation is None else [training, evaluation]
    return max((budget.get_verdict(card_bytes) for budget in budgets), key=VERDICTS.index)


def find_fitting_eval_batch(
    cost: StepCost, loop: PlannedLoop, card_bytes: float, world_size: int, context_parallel_size: int = 1
) -> int | None:
    """Find an evaluation batch that certainly fits.

    It is the loop's, or the first of its halves.

    Args:
        cost: The simulated step.
        loop: The loop.
        card_bytes: Memory of one card.
        world_size: Processes.
        context_parallel_size: Processes that share a sequence in training.

    Returns:
        The batch; 0 where none fits, None where no measurement is planned.
    """
    batch = loop.eval_batch
    while batch:
        budget = compute_evaluation_budget(cost, replace(loop, eval_batch=batch), world_size, context_parallel_size)
        if budget is not None and budget.upper_bound <= card_bytes:
            return batch
        batch //= 2
    return 0 if loop.eval_batch else None
