"""torch.compile by blocks: each decoder layer by itself, never the whole model.

The layers share one compiled function, so the compiler runs once for all of them. What is around them (the mask, the head and its loss)
stays as it is: Liger's loss reads a number on the host, and a traced mask is always built, both of which a whole-model compile pays for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from azrecipe.errors import CommandError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from azrecipe.recipe.load import Recipe


def compile_blocks(model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compile the forward of each block of a model.

    The forward alone, so that hooks around it (FSDP's, which gather the weights) run outside, and the model's names stay.

    Returns:
        The number of blocks.

    Raises:
        CommandError: The model's class names no blocks.
    """
    check_blocks(model)
    blocks = find_blocks(model)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    return len(blocks)


def check_blocks(model: PreTrainedModel) -> None:
    """Raise CommandError for a model whose class names no blocks."""
    if not find_blocks(model):
        raise CommandError(f"torch_compile: a {model.config.model_type} names no blocks to compile (_no_split_modules)")


def check_torch_compile(recipe: Recipe, model: PreTrainedModel) -> None:
    """Check that a model has blocks that a recipe can compile.

    Args:
        recipe: The recipe, with training.torch_compile on.
        model: The model.

    Raises:
        RecipeError: It has none.
    """
    try:
        check_blocks(model)
    except CommandError as error:
        raise recipe.error(str(error), "training", "torch_compile") from None


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Find a model's decoder layers, by transformers' own list."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]
