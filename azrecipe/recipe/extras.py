"""The optional packages that a recipe needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator

from azrecipe.errors import CannotRun
from azrecipe.recipe.load import Recipe

WORD_VECTOR_METHODS = ("focus", "omp")
BITSANDBYTES = ("adamw_8bit", "lion_32bit", "lion_8bit")


def required_packages(recipe: Recipe) -> Iterator[str]:
    """The packages of azrecipe's extras that a recipe needs, as its metadata names them."""

    data = recipe.data
    wanted = ["evaluation"] if recipe.stage == "evaluate" else []
    wanted += ["harness"] if data.get("tasks") else []
    wanted += ["focus"] if data.get("tokenizer", {}).get("new_embeddings") in WORD_VECTOR_METHODS else []
    optimizers = [data.get("training", {}).get("optim"), *(phase.get("optim") for phase in data.get("phases") or [])]
    wanted += ["qlora"] if data.get("adapter") == "qlora" or set(optimizers) & set(BITSANDBYTES) else []
    for requirement in importlib.metadata.requires("azrecipe") or []:
        name, _, marker = requirement.partition(";")
        if any(re.search(rf"extra == ['\"]{extra}['\"]", marker) for extra in wanted):
            yield name.strip()


def check_word_vectors(method: str) -> None:
    """Raise CannotRun for a method that needs vectors where gensim, which trains them, is not installed."""
    if method in WORD_VECTOR_METHODS and importlib.util.find_spec("gensim") is None:
        raise CannotRun(f"tokenizer.new_embeddings: {method} needs gensim: pip install 'azrecipe[focus]'")


def check_adapter(adapter: str) -> None:
    """Raise CannotRun where a base in 4 bits is asked for and bitsandbytes is not there."""
    if adapter == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise CannotRun("adapter: qlora needs bitsandbytes: pip install 'azrecipe[qlora]'")


def check_trackers(report_to: list[str]) -> None:
    """Raise CannotRun for trackers whose package is missing."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(
            f"report_to: {', '.join(missing)} is not installed: pip install {' '.join(missing)}, or --set training.report_to=[]"
        )


def check_optimizers(names: Iterable[str]) -> None:
    """Raise CannotRun for optimizers whose package is missing."""
    lacking = [name for name in names if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None]
    if lacking:
        raise CannotRun(
            f"optim: {', '.join(lacking)} needs bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or --set training.optim=adamw_torch_fused"
        )
