"""A request to run a recipe or a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunRequest:
    """A recipe or pipeline to run, and how.

    Attributes:
        recipe: Its path, as on the command line.
        overrides: KEY=VALUE, as `--set` takes them.
        runs_dir: The folder of run directories.
        step: The only step of a pipeline.
        cell: The only cell of a matrix.
        accelerate_config: A file in accelerate_configs/ by name, or a path.
        num_processes: Processes on this machine.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    runs_dir: Path = Path("runs")
    step: str | None = None
    cell: str | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None

    def build_arguments(self, step: str | None, cell: str | None) -> list[str]:
        """Build the command-line arguments of one process of the run."""
        words = [self.recipe, "--runs-dir", str(self.runs_dir)]
        for override in self.overrides:
            words += ["--set", override]
        words += ["--step", step] if step else []
        return [*words, "--cell", cell] if cell else words
