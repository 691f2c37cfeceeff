"""Liger asked for is Liger had: known by architecture before, and by the live layers after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from azrecipe.errors import CannotRun
from azrecipe.parts import liger
from tests.conftest import ROOT


def test_an_architecture_without_kernels_is_refused() -> None:
    liger.check("llama")
    with pytest.raises(CannotRun, match=r"no kernels for a gpt2.*use_liger_kernel=false"):
        liger.check("gpt2")


def test_patched_layers_are_found_and_only_those(llama: Path) -> None:
    """In a process of its own: Liger replaces functions of transformers' modules for every model of a process."""
    script = f"""
from azrecipe.parts import liger
from azrecipe.parts.model import load_model
from transformers.integrations.liger import apply_liger_kernel
model = load_model({str(llama)!r}, "float32")
before = liger.patched(model)
apply_liger_kernel(model, None)
print(before, liger.patched(model))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['LlamaForCausalLM', 'LlamaMLP', 'LlamaRMSNorm']"
