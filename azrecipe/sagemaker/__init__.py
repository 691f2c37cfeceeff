"""The same run as a SageMaker job, seen from here and inside.

`submit` and what it returns may be used from a notebook. Importing this needs nothing but azrecipe, and loads what is asked for only; submitting needs the extra: pip install 'azrecipe[sagemaker]'.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    **dict.fromkeys(("Job", "attach", "fetch", "logs", "status", "stop"), "jobs"),
    **dict.fromkeys(("Settings", "load"), "settings"),
    **dict.fromkeys(("Submission", "requests", "submit"), "submission"),
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
