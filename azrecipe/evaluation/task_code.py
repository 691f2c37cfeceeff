"""Keep task files of lm-evaluation-harness from running code unasked.

The harness' own tasks are trusted; a task file of a recipe runs Python only with --allow-code. Templates of all are rendered in a sandbox.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.task_files import CODE_MESSAGE, TaskFiles, read_task_files
from azrecipe.utils.environment_variables import ALLOW_CODE
from azrecipe.utils.paths import is_local_task
from azrecipe.utils.time_limits import PATTERN_SECONDS, TimeLimitError, limit_seconds

FILTER_SECONDS, FILTER_SECONDS_EACH = 60.0, 0.05  # for the filters of a task's answers, and for each answer


def list_code_problems(task: TaskFiles) -> list[Problem]:
    """List a task file's problems, and its code that is not allowed."""
    return task.problems if ALLOW_CODE.is_set else [*task.problems, *task.functions]


def check_task_code(recipe: Recipe) -> None:
    """Check that a recipe's own task files name no code.

    With --allow-code they may.

    Raises RecipeError with every place. Nothing is imported.
    """
    names = [task if isinstance(task, str) else task.task for task in recipe.config.tasks]
    files = [Path(name) for name in names if is_local_task(name) and Path(name).is_file()]
    if problems := [problem for file in files for problem in list_code_problems(read_task_files(file))]:
        raise RecipeError(problems)


@cache
def guard_harness() -> None:
    """Put the guards into lm-evaluation-harness, once a process."""
    import lm_eval
    from lm_eval import utils as harness_utils
    from lm_eval.api import registry
    from lm_eval.api import task as task_module
    from lm_eval.api.filter import FilterEnsemble
    from lm_eval.tasks import _yaml_loader

    from azrecipe.utils.template_budget import TemplateLimitError
    from azrecipe.utils.template_limits import LimitedEnvironment

    package = Path(lm_eval.__file__).resolve().parent
    import_function, get_metric = _yaml_loader._import_func_in_yml, task_module.get_metric

    def import_guarded(name: str, base_dir: Path) -> Any:
        if not ALLOW_CODE.is_set and not Path(base_dir).resolve().is_relative_to(package):
            raise CommandError(f"{base_dir}: {CODE_MESSAGE.format(f'!function {name} names a function')}")
        return import_function(name, base_dir)

    def get_guarded_metric(name: str, hf_evaluate_metric: bool = False) -> Any:
        import lm_eval.api.metrics  # noqa: F401 - registers the harness' metrics

        if not ALLOW_CODE.is_set and (hf_evaluate_metric or name not in registry.metric_registry):
            raise CommandError(
                CODE_MESSAGE.format(f"the metric '{name}' is none of lm-evaluation-harness' and would be downloaded and run")
            )
        return get_metric(name, hf_evaluate_metric)

    apply_filters = FilterEnsemble.apply

    def apply_limited(ensemble: FilterEnsemble, instances: list[Any]) -> None:
        seconds = FILTER_SECONDS + FILTER_SECONDS_EACH * len(instances)
        try:
            with limit_seconds(seconds):
                apply_filters(ensemble, instances)
        except TimeLimitError:
            raise CommandError(
                f"tasks: {instances[0].task_name}: the filter '{ensemble.name}' takes more than {seconds:.0f} seconds for {len(instances)} answers: "
                "its regular expression tries too many ways to match"
            ) from None

    def replace_limited(*arguments: Any, **options: Any) -> Any:
        try:
            with limit_seconds(PATTERN_SECONDS):
                return plain.filters["regex_replace"](*arguments, **options)
        except TimeLimitError:
            raise TemplateLimitError(f"its regex_replace takes more than {PATTERN_SECONDS:g} seconds") from None

    _yaml_loader._import_func_in_yml = import_guarded
    FilterEnsemble.apply = apply_limited
    task_module.get_metric = get_guarded_metric
    plain = harness_utils.env
    environment = LimitedEnvironment(loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    environment.filters.update({**plain.filters, "regex_replace": replace_limited})
    environment.limit()
    harness_utils.env = environment
