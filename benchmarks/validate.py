"""How long `azrecipe validate` takes as a command, from the shell's point of view.

    python benchmarks/validate.py [RECIPE ...] [--runs 10]

Prints machine, versions, and minimum, median and maximum of the wall time of each recipe in a fresh process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command, which must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipes", nargs="*", default=["recipes/cpt_phase1.yaml", "recipes/pipeline.yaml", "recipes"])
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    print(
        f"{platform.platform()}, Python {platform.python_version()}, jsonschema {version('jsonschema')}, PyYAML {version('PyYAML')}, {arguments.runs} runs each"
    )
    for recipe in arguments.recipes:
        times = [seconds([sys.executable, "-m", "azrecipe", "validate", recipe]) for _ in range(arguments.runs)]
        print(f"{recipe}: minimum {min(times):.3f} s, median {statistics.median(times):.3f} s, maximum {max(times):.3f} s")


if __name__ == "__main__":
    main()
