"""Runs inside llama.cpp's converter, in its Python: tells it how to cut text where it does not recognise a tokenizer.

    python gguf_converter.py SCRIPT PRE_TOKENIZER ARCHITECTURE [the script's own arguments]

The converter knows a byte-level BPE by a hash of the ids that it makes of one text, so it knows no vocabulary but those it has
seen, whatever their split rule, and ends with "BPE pre-tokenizer was not recognized". Its model class for ARCHITECTURE is replaced,
in its own register of classes, by a subclass that answers PRE_TOKENIZER (llama.cpp's name of the split rule) in that case.
A script without such a register runs as it is. Imports nothing of azrecipe, which that Python may not have.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main(script: str, name: str, architecture: str) -> None:
    """Load the converter, teach it the one name, and let it do the rest."""
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
    known = _class(converter, architecture)
    if known is not None:
        converter.ModelBase.register(architecture)(taught(known, name))
    converter.main()


def _class(converter: ModuleType, architecture: str) -> Any:
    """The converter's class for an architecture; None for one it lacks, or a converter that is built otherwise."""
    base = getattr(converter, "ModelBase", None)
    find = getattr(converter, "get_model_class", None) or getattr(base, "from_model_architecture", None)
    if base is None or find is None or not hasattr(base, "register"):
        return None
    try:
        found = find(architecture)
    except NotImplementedError:  # the converter says so itself, in its own words
        return None
    return found if hasattr(found, "get_vocab_base_pre") else None


def taught(known: Any, name: str) -> Any:
    """A subclass of a converter's model class that knows one tokenizer more."""

    class Taught(known):  # type: ignore[misc]
        model_arch = known.model_arch  # the converter asks every class for one of its own

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            """llama.cpp's name of the tokenizer's split rule."""
            try:
                return str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                return name

    Taught.__name__ = known.__name__
    return Taught


if __name__ == "__main__":
    path, pre_tokenizer, architecture_name = sys.argv[1:4]
    sys.argv = [path, *sys.argv[4:]]
    main(path, pre_tokenizer, architecture_name)
