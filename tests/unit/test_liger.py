"""Liger asked for is Liger had: known by architecture before, and by the live layers after."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import CannotRun
from azrecipe.parts import liger
from azrecipe.parts.model import load_model


def test_an_architecture_without_kernels_is_refused() -> None:
    liger.check("llama")
    with pytest.raises(CannotRun, match=r"no kernels for a gpt2.*use_liger_kernel=false"):
        liger.check("gpt2")


def test_patched_layers_are_found_and_only_those(llama: Path) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    model = load_model(str(llama), "float32")
    assert liger.patched(model) == []
    apply_liger_kernel(model, None)
    assert liger.patched(model) == ["LlamaForCausalLM", "LlamaMLP", "LlamaRMSNorm"]
