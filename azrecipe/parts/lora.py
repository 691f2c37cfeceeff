"""LoRA adapters: which layers get one, and the adapter folded into plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.errors import CommandError, did_you_mean
from azrecipe.parts.model import load_model
from azrecipe.recipe.types import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lora_config(lora: Lora, model: PreTrainedModel) -> Any:
    """peft.LoraConfig for a model. Raises CommandError for a target that names none of its linear layers."""
    from peft import LoraConfig

    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    known = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
    unknown = [name for name in targets if name not in known and name != "all-linear"]
    if unknown:
        lines = [f"lora.target_modules: no linear layer is called '{name}'{did_you_mean(name, known)}" for name in unknown]
        raise CommandError("\n".join([*lines, f"Linear layers of this model: {', '.join(known)}, or all-linear"]))
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if "all-linear" in targets else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def merged(base: str, adapter: Path, precision: str, revision: str | None) -> PreTrainedModel:
    """The base model with the adapter added to its weights: an ordinary model."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base, precision, revision=revision), str(adapter)).merge_and_unload(safe_merge=True)
