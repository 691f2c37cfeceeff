"""Run llama.cpp's converter with one more pre-tokenizer.

    python gguf_converter.py SCRIPT PRE_TOKENIZER ARCHITECTURE [the script's own arguments]

The converter recognises a byte-level BPE by a hash of the ids of one text. It recognises no custom vocabulary, whatever its split
rule, and ends with "BPE pre-tokenizer was not recognized". This script replaces the converter's model class for ARCHITECTURE, in
its register of classes, by a subclass that returns PRE_TOKENIZER (llama.cpp's name of the split rule) in that case. A converter
without such a register runs unchanged. The converter's Python may lack azrecipe, so nothing of it is imported here.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def run_converter(script: str, pre_tokenizer: str, architecture: str) -> None:
    """Load the converter, add the pre-tokenizer, and run it."""
    sys.path.insert(0, str(Path(script).parent))
    text = Path(script).read_text(encoding="utf-8", errors="replace")
    if not ("ModelBase" in text and "def main(" in text):
        runpy.run_path(script, run_name="__main__")
        return
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", script)
    assert spec is not None and spec.loader is not None
    converter = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = converter
    spec.loader.exec_module(converter)
    model_class = _find_model_class(converter, architecture)
    if model_class is not None:
        converter.ModelBase.register(architecture)(add_pre_tokenizer(model_class, pre_tokenizer))
    converter.main()


def _find_model_class(converter: ModuleType, architecture: str) -> Any:
    """Find the converter's class for an architecture.

    Returns None where it has none, and for a converter without the expected functions.
    """
    base = getattr(converter, "ModelBase", None)
    find = getattr(converter, "get_model_class", None) or getattr(base, "from_model_architecture", None)
    if base is None or find is None or not hasattr(base, "register"):
        return None
    try:
        model_class = find(architecture)
    except NotImplementedError:  # the converter reports an unknown architecture itself
        return None
    return model_class if hasattr(model_class, "get_vocab_base_pre") else None


def add_pre_tokenizer(model_class: Any, pre_tokenizer: str) -> Any:
    """Return a subclass of a model class with one more pre-tokenizer."""

    class ExtendedModel(model_class):  # type: ignore[misc]
        model_arch = model_class.model_arch  # the converter reads it from every class' own attributes

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            """Return llama.cpp's name of the tokenizer's split rule."""
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                return pre_tokenizer

    ExtendedModel.__name__ = model_class.__name__
    return ExtendedModel


if __name__ == "__main__":
    script_path, pre_tokenizer_name, architecture_name = sys.argv[1:4]
    sys.argv = [script_path, *sys.argv[4:]]
    run_converter(script_path, pre_tokenizer_name, architecture_name)
