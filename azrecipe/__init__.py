"""azrecipe: teach an existing language model a new language by editing YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from azrecipe.api import check, load_recipe, plan, read_run, run, submit

__version__ = "0.1.0"
__all__ = ["__version__", "check", "load_recipe", "plan", "read_run", "run", "submit"]


def __getattr__(name: str) -> Any:
    """Load the Python interface when one of its functions is used."""
    if name in __all__:
        from azrecipe import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
