"""A step's model, on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from azrecipe.modeling import frozen_weights, parameter_groups
from azrecipe.modeling import lora as adapters
from azrecipe.modeling.dtypes import PARAM_DTYPES
from azrecipe.planning.simulation import bitsandbytes_stubs
from azrecipe.planning.simulation.step_spec import StepSpec


def build_meta_model(spec: StepSpec) -> Any:
    """Build a step's model on the meta device.

    Its adapter is applied, and its frozen parameters are frozen.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(spec.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    # Without a mask, step_simulation puts another attention in the place of eager; some models (Gemma 2) have no sdpa to begin with.
    attention = "sdpa" if spec.attn_implementation == "sdpa" else "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_get_param_dtype(spec), attn_implementation=attention)
    model.config.use_cache = False
    if spec.lora is None:
        parameter_groups.set_trainable_parameters(model, list(spec.trainable), range(spec.new_rows))
    else:
        from peft import get_peft_model

        config = adapters.build_lora_config(spec.lora, model, range(spec.new_rows) if spec.lora.train_new_tokens else ())
        if spec.quantized:
            bitsandbytes_stubs.quantize_model(model)
        with torch.device("meta"):
            model = get_peft_model(model, config)
        if spec.adapter_dtype is not None:
            _cast_adapter(model, getattr(torch, spec.adapter_dtype))
    if spec.rounds_frozen_weights:
        frozen_weights.round_matrices(model)
    return model


def _get_param_dtype(spec: StepSpec) -> torch.dtype:
    """Return the dtype of the parameters.

    In a quantized model, the other parameters have the dtype of the computation (lora.BaseModel.load_quantized).
    """
    if spec.weights_dtype is not None:
        return getattr(torch, spec.weights_dtype)  # type: ignore[no-any-return]
    return torch.bfloat16 if spec.quantized and spec.precision != "float32" else PARAM_DTYPES[spec.precision]


def _cast_adapter(model: Any, dtype: torch.dtype) -> None:
    """Cast what trains as TRL does: not DoRA's magnitudes (trl/trainer/sft_trainer.py)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(dtype)
