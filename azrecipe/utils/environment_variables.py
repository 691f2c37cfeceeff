"""The environment variables of azrecipe: names, defaults and meanings.

All modules read them here, and docs/environment.md is generated from this table: python -m azrecipe.utils.environment_variables
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from azrecipe.errors import CommandError


@dataclass(frozen=True)
class EnvironmentVariable:
    """One environment variable; an empty value counts as none.

    Attributes:
        name: Its name.
        default: The value without it; "" where it switches something on.
        default_text: How docs name that value.
        meaning: What it does, in Markdown.
    """

    name: str
    default: str
    default_text: str
    meaning: str

    @property
    def is_set(self) -> bool:
        return bool(os.environ.get(self.name))

    def read(self) -> str:
        """Return its value, or the default."""
        return os.environ.get(self.name) or self.default

    def read_seconds(self) -> float:
        """Return its value as a number of seconds.

        Raises CommandError for anything else.
        """
        try:
            seconds = float(self.read())
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise CommandError(f"{self.name}={self.read()}: give a number of seconds above 0, such as {self.default}")
        return seconds

    def __str__(self) -> str:
        return self.name


PAGE = EnvironmentVariable("AZRECIPE_PAGE", "1", "1", "`0`: runs write no report.html (docs/report.md)")
ESTIMATE = EnvironmentVariable(
    "AZRECIPE_FORESEE", "", "on a GPU only", "The estimate before a run: `0` never, `1` on a CPU too (docs/plan.md)"
)
ESTIMATE_SECONDS = EnvironmentVariable("AZRECIPE_FORESEE_SECONDS", "30", "30", "How long that estimate may take, in seconds")
STORAGE = EnvironmentVariable(
    "AZRECIPE_STORAGE",
    "shared",
    "shared",
    "`local`: each machine has a run directory of its own, which is uploaded in the background; `shared`: all see one (docs/backends.md)",
)
CACHE = EnvironmentVariable("AZRECIPE_CACHE", "", "`<runs_dir>/.cache`", "The folder of tokenised text")
TENSORBOARD = EnvironmentVariable(
    "AZRECIPE_TENSORBOARD", "", "`<run>/tensorboard`", "The folder of TensorBoard's files, with a subfolder for each phase"
)
EXIT_CODES = EnvironmentVariable(
    "AZRECIPE_EXIT_CODES",
    "",
    "none",
    "A folder where each process of a run writes its exit code, named by its rank, and its error message (`<rank>.reason`). azrecipe sets "
    "it for the processes that it launches, as launchers turn every failure into exit code 1. While a process runs, it holds a lock on "
    "`<rank>.lock`",
)
ALLOW_SECRETS = EnvironmentVariable(
    "AZRECIPE_ALLOW_SECRETS",
    "",
    "none",
    "`1`: what looks like a password, token or private key in a recipe or an upload is not refused (docs/sagemaker.md). azrecipe sets it in "
    "the container of a job, whose recipe was scanned before",
)
ALLOW_CODE = EnvironmentVariable(
    "AZRECIPE_ALLOW_CODE",
    "",
    "none",
    "`1`: functions that a recipe's own task files name are run, as with `--allow-code` (docs/evaluation.md)",
)
START_TIMEOUT = EnvironmentVariable(
    "AZRECIPE_START_TIMEOUT",
    "7200",
    "7200",
    "How long the processes of a run wait for each other before training begins, in seconds. Then the run ends, and names those that did not "
    "come (docs/training.md)",
)
STEP_TIMEOUT = EnvironmentVariable(
    "AZRECIPE_STEP_TIMEOUT",
    "600",
    "600",
    "How long the processes of a run wait for each other within a training step, in seconds. Then the run ends (docs/training.md). The "
    "first step of a loop, measuring and saving may take two hours",
)
STOP_TIMEOUT = EnvironmentVariable(
    "AZRECIPE_STOP_TIMEOUT",
    "20",
    "20",
    "How long a training step may go on after SIGTERM, SIGINT or SIGHUP, in seconds; three times the longest step before, if that is more. Then "
    "the process ends without a checkpoint (docs/training.md)",
)
API_KEY = EnvironmentVariable(
    "AZRECIPE_API_KEY", "", "none", "The key that clients of `azrecipe serve` must send, as `--api-key` (docs/using.md)"
)
SERVE_SETTINGS = EnvironmentVariable("AZRECIPE_SERVE", "", "none", "What the server's process is told by `azrecipe serve`, which sets it")
VARIABLES = (
    ALLOW_CODE,
    ALLOW_SECRETS,
    API_KEY,
    CACHE,
    ESTIMATE,
    ESTIMATE_SECONDS,
    EXIT_CODES,
    PAGE,
    SERVE_SETTINGS,
    START_TIMEOUT,
    STEP_TIMEOUT,
    STOP_TIMEOUT,
    STORAGE,
    TENSORBOARD,
)


def generate_document() -> str:
    """Generate docs/environment.md."""
    rows = [f"| `{variable}` | {variable.default_text} | {variable.meaning} |" for variable in VARIABLES]
    return "\n".join(
        [
            "# Environment variables",
            "",
            "Written by `python -m azrecipe.utils.environment_variables > docs/environment.md`; edit the table there. An empty value counts as",
            "none. `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`, `CUDA_VISIBLE_DEVICES` and the other variables of libraries work as their own",
            "documentation says.",
            "",
            "| variable | default | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(generate_document(), end="")
