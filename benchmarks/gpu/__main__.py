"""What training costs on this machine's GPU, and whether it is right there: one command, in stages, each useful alone.

    python benchmarks/gpu [--stage environment attention correctness training measuring runs] [--minutes 9] [--out FOLDER] [--text FILE] [--toy]

The job is the recipes' own: Llama 3.2 1B's shape with 100,000 rows of vocabulary and random weights, packed documents of 2,048 tokens a
sequence, bf16_mixed, our trainer. What is measured already stands in FOLDER/results.json and is not measured again, so the same command
goes on after an interruption. `--text`: JSON lines with a `text` each; without it text is made from a seed. `--toy`: a toy model, on any
machine, whose figures mean nothing. `--rows`: of a stage, those whose names begin so. Prints one table in markdown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import project
import trainer
from results import Results

STAGES = ("environment", "attention", "correctness", "training", "measuring", "runs")
GRACE = 20  # seconds that a process has beyond its time before it is ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rows", nargs="+", default=[], help="of the stage training: those whose first word is named")
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked)
        return
    until = time.monotonic() + asked.minutes * 60
    asked.out.mkdir(parents=True, exist_ok=True)
    for stage in asked.stage:
        groups = ("single", "fsdp") if stage == "training" else ("",)
        for group in groups:
            left = until - time.monotonic()
            if left > 10 and (not group or not asked.rows or any(name.split()[0] in asked.rows for name in trainer.GROUPS[group])):
                launch(stage, group, asked, left)
    show(Results(asked.out / "results.json", until))


def launch(stage: str, group: str, asked: argparse.Namespace, seconds: float) -> None:
    """Run a stage in a process of its own; twice where the GPU failed in the first."""
    command = [__file__, "--worker", f"{stage}:{group}", "--minutes", str(seconds / 60), "--out", str(asked.out)]
    command += ["--rows", *asked.rows] if asked.rows else []
    command += ["--text", str(asked.text)] if asked.text else []
    command += ["--toy"] if asked.toy else []
    launcher: list[str] = []
    if group == "fsdp":
        file = project.ROOT / "accelerate_configs" / "fsdp.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "1"]
    paths = os.pathsep.join([str(project.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = asked.out / f"{stage}{'-' if group else ''}{group}.log"
    with log.open("a", encoding="utf-8") as errors:
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, *launcher, *command], stderr=errors, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True
            )
            try:
                process.wait(timeout=seconds + GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                print(f"{stage} {group}: ended after its time; what it measured is kept", flush=True)
                return
            if process.returncode != AGAIN:
                break
    if process.returncode not in (0, AGAIN):
        print(f"{stage} {group}: exit code {process.returncode}\n{log.read_text(encoding='utf-8')[-3000:]}", flush=True)


AGAIN = 75  # a worker's exit code: its GPU failed, and another process may go on


def work(asked: argparse.Namespace) -> None:
    """One stage, in this process."""
    stage, _, group = asked.worker.partition(":")
    results = Results(asked.out / "results.json", time.monotonic() + asked.minutes * 60)
    project.quiet()
    recipe = project.make_project(asked.out / "project", asked.toy, asked.text)
    module = importlib.import_module("trainer" if stage == "training" else stage)
    if stage != "training":
        module.run(results, recipe, asked.toy)
        return
    if not module.run(results, recipe, asked.toy, group, asked.rows):
        os._exit(AGAIN)  # an exit as usual would wait for a GPU that has failed


def show(results: Results) -> None:
    """The table: a line a row, its figures as they are."""
    rows = results.rows
    machine = rows.get("environment", {}).get("machine", {})
    print(f"\n{json.dumps(machine)}, seed {project.SEED}\n\n| stage | row | figures |\n| --- | --- | --- |")
    for stage, of_stage in rows.items():
        for name, row in of_stage.items():
            figures = {key: value for key, value in row.items() if key not in ("profile", "where")}
            print(f"| {stage} | {name} | {json.dumps(figures, ensure_ascii=False)[:400]} |")


if __name__ == "__main__":
    main()
