"""The optional packages that a recipe needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from azrecipe.errors import CannotRun
from azrecipe.recipe.load import Recipe

WORD_VECTOR_METHODS = ("focus", "omp")
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "lion_32bit", "lion_8bit")


def _needs_bitsandbytes(recipe: Recipe) -> bool:
    data = recipe.data
    optimizers = [data.get("training", {}).get("optim"), *(phase.get("optim") for phase in data.get("phases") or [])]
    return data.get("adapter") == "qlora" or bool(set(optimizers) & set(BITSANDBYTES_OPTIMIZERS))


@dataclass(frozen=True)
class Extra:
    """An optional part, its packages, and the recipes that need it."""

    modules: tuple[str, ...]  # what the extra's packages are imported as
    is_needed: Callable[[Recipe], bool] = lambda _: False  # the launcher or a command needs the others
    package: str = ""  # what pip installs, where it is no extra of azrecipe


EXTRAS: Mapping[str, Extra] = {
    "evaluation": Extra(("lingua", "sacrebleu", "rouge_score"), lambda recipe: recipe.stage == "evaluate"),
    "harness": Extra(("lm_eval",), lambda recipe: bool(recipe.data.get("tasks"))),
    "focus": Extra(("gensim",), lambda recipe: recipe.data.get("tokenizer", {}).get("new_embeddings") in WORD_VECTOR_METHODS),
    "qlora": Extra(("bitsandbytes",), _needs_bitsandbytes),
    "deepspeed": Extra(("deepspeed",)),
    "sagemaker": Extra(("boto3", "sagemaker.train")),
    "serve": Extra(("fastapi", "openai", "pydantic", "starlette", "uvicorn")),  # transformers serve
    "vllm": Extra(("vllm",), package="vllm"),
}


def list_required_packages(recipe: Recipe) -> Iterator[str]:
    """Yield the packages of the extras that a recipe needs.

    The requirements are those of azrecipe's metadata.
    """
    names = [name for name, extra in EXTRAS.items() if extra.is_needed(recipe)]
    for requirement in importlib.metadata.requires("azrecipe") or []:
        package, _, marker = requirement.partition(";")
        if any(re.search(rf"extra == ['\"]{name}['\"]", marker) for name in names):
            yield package.strip()


def list_missing_modules(extra: str) -> list[str]:
    """List the modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra].modules if not _is_importable(module)]


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def is_installed(extra: str) -> bool:
    """Whether all packages of an extra are installed."""
    return not list_missing_modules(extra)


def get_install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install {EXTRAS[extra].package}" if EXTRAS[extra].package else f"pip install 'azrecipe[{extra}]'"


def check_extra(extra: str, subject: str, needed: Iterable[str] | None = None) -> None:
    """Raise CannotRun where an extra is not installed.

    The message is `subject`, which names the packages, and the command that installs them.

    Args:
        extra: Its name.
        subject: The beginning of the message.
        needed: The modules that are needed; None: all of the extra.
    """
    missing = list_missing_modules(extra)
    if missing if needed is None else set(missing) & set(needed):
        raise CannotRun(f"{subject}: {get_install_command(extra)}")


def check_word_vectors(method: str) -> None:
    """Raise CannotRun where the method needs gensim and it is missing."""
    if method in WORD_VECTOR_METHODS:
        check_extra("focus", f"tokenizer.new_embeddings: {method} needs gensim")


def check_adapter(adapter: str) -> None:
    """Raise CannotRun where the adapter needs bitsandbytes and it is missing."""
    if adapter == "qlora":
        check_extra("qlora", "adapter: qlora needs bitsandbytes")


def check_trackers(report_to: list[str]) -> None:
    """Raise CannotRun for trackers with a missing package."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(
            f"report_to: {', '.join(missing)} is not installed: pip install {' '.join(missing)}, or --set training.report_to=[]"
        )


def check_optimizers(names: Iterable[str]) -> None:
    """Raise CannotRun for optimizers with a missing package."""
    unavailable = [name for name in names if name in BITSANDBYTES_OPTIMIZERS and not is_installed("qlora")]
    if unavailable:
        raise CannotRun(
            f"optim: {', '.join(unavailable)} needs bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or --set training.optim=adamw_torch_fused"
        )
