"""Recipes as SageMaker training jobs: submission, and the container's side.

Notebooks use `submit` and the job that it returns. Names load when they are used, so that the import needs nothing but azrecipe. Submission
needs the extra: pip install 'azrecipe[sagemaker]'.
"""

from __future__ import annotations

import importlib
from typing import Any

# The names of this package, with the module and the name that define each. `Job` and `Settings` are the old names of two classes.
_EXPORTS = {
    "Job": ("jobs", "TrainingJob"),
    "SageMakerSettings": ("settings", "SageMakerSettings"),
    "Settings": ("settings", "SageMakerSettings"),
    "Submission": ("submission_summary", "Submission"),
    "TrainingJob": ("jobs", "TrainingJob"),
    "attach": ("jobs", "attach_job"),
    "fetch": ("jobs", "fetch_run"),
    "load": ("settings", "load_settings"),
    "logs": ("jobs", "read_logs"),
    "requests": ("submission", "build_requests"),
    "status": ("jobs", "describe_jobs"),
    "stop": ("jobs", "stop_job"),
    "submit": ("submission", "submit"),
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
