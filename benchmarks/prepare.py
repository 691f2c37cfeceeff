"""What preparing text costs: against `datasets.map` with group_texts, as transformers' run_clm example has it, and memory as text grows.

    python benchmarks/prepare.py [--megabytes 100] [--large 1000] [--processes N] [--runs 5] [--vocab-size 32000] [--only speed memory]

The text is benchmarks/tokenizer.py's, from a seed. Each figure comes from a process of its own, the two ways taking turns; time is
from the files of text to tokens on disk, without imports. Peak memory is the largest sum of the resident sizes of the
process and all below it, sampled every 20 ms. Prints machine, versions and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

BLOCK = 1024  # tokens in a group, run_clm's default


def theirs(file: str, tokenizer_folder: str, work: str, processes: int) -> int:
    """Tokenise in a batched map, then concatenate and cut in another, both with num_proc processes; returns the tokens."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"])

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*examples[key])) for key in examples}
        total = (len(joined["input_ids"]) // BLOCK) * BLOCK
        result = {key: [values[i : i + BLOCK] for i in range(0, total, BLOCK)] for key, values in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    raw = datasets.load_dataset("json", data_files=file, split="train", cache_dir=work)
    cut = raw.map(tokenize, batched=True, num_proc=processes, remove_columns=raw.column_names)
    grouped = cut.map(group, batched=True, num_proc=processes)
    return len(grouped) * BLOCK


def ours(file: str, tokenizer_folder: str, work: str, processes: int) -> int:
    """What `azrecipe prepare` does with one source; returns the tokens."""
    from azrecipe.data.readers import DataSource
    from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
    from azrecipe.errors import SourceLocation
    from azrecipe.recipe.types import TextSource
    from azrecipe.tokenization.tokenizer import load_tokenizer

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processes])  # as many workers as it may use cores
    source = DataSource(TextSource(file, "train"), SourceLocation("benchmark"))
    return load_or_tokenize(source, TokenizeSpec(load_tokenizer(tokenizer_folder), frozenset()), Path(work)).num_tokens


def alone(way: str, file: Path, tokenizer: Path, processes: int) -> tuple[int, float, int]:
    """One way in a process of its own: tokens, seconds, and peak bytes of it and those below it."""
    import psutil

    with tempfile.TemporaryDirectory(dir=file.parent) as work:
        line = [sys.executable, __file__, "--run", json.dumps([way, str(file), str(tokenizer), work, processes])]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        peak, tree = 0, psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            try:
                for each in (tree, *tree.children(recursive=True)):
                    total += each.memory_info().rss
            except psutil.Error:
                continue
            peak = max(peak, total)
            time.sleep(0.02)
        assert process.stdout is not None
        if process.returncode:
            raise SystemExit(f"{way} failed: {' '.join(line)}")
        tokens, seconds = json.loads(process.stdout.read().splitlines()[-1])
    return tokens, seconds, peak


def run(way: str, *arguments: Any) -> None:
    """In the process that is measured: imports first, they are not what is measured."""
    import datasets  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import azrecipe.data.tokenized_cache
    import azrecipe.tokenization.tokenizer  # noqa: F401

    began = time.perf_counter()
    tokens = {"theirs": theirs, "ours": ours}[way](*arguments)
    print(json.dumps([tokens, time.perf_counter() - began]))


def speed(file: Path, tokenizer: Path, processes: int, runs: int) -> None:
    rates: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _ in range(runs):
        for way, found in rates.items():
            tokens, seconds, _ = alone(way, file, tokenizer, processes)
            found.append(tokens / seconds)
    a, b = (statistics.median(rates[way]) for way in ("theirs", "ours"))
    spread = {way: f"{min(found):,.0f}–{max(found):,.0f}" for way, found in rates.items()}
    print(f"tokens/s, {processes} processes, medians of {runs}: datasets.map and group_texts {a:,.0f} ({spread['theirs']}),")
    print(f"  azrecipe {b:,.0f} ({spread['ours']}), ratio {b / a:.2f}", flush=True)


def memory(small: tuple[Path, int], large: tuple[Path, int], tokenizer: Path, processes: int) -> None:
    """Ours alone: `datasets.map` needs hours for the large text."""
    a, b = (alone("ours", file, tokenizer, processes)[2] for file, _ in (small, large))
    print(
        f"peak memory, {processes} processes: {small[1]} MB {a / 1e6:.0f} MB, {large[1]} MB {b / 1e6:.0f} MB, ratio {b / a:.2f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--large", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--only", nargs="+", default=["speed", "memory"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(*json.loads(arguments.run))
        return
    from tokenizer import SEED, make_text, read

    from azrecipe.tokenization.bpe_training import train_llama3
    from azrecipe.tokenization.tokenizer import save_tokenizer

    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "datasets", "transformers", "pyarrow"))
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}, seed {SEED}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small, large, tokenizer = Path(folder, "small.jsonl"), Path(folder, "large.jsonl"), Path(folder, "tokenizer")
        make_text(small, arguments.megabytes)
        save_tokenizer(train_llama3((text for text, _ in zip(read(small), range(5000), strict=False)), arguments.vocab_size), tokenizer)
        if "speed" in arguments.only:
            speed(small, tokenizer, arguments.processes, arguments.runs)
        if "memory" in arguments.only:
            make_text(large, arguments.large)
            memory((small, arguments.megabytes), (large, arguments.large), tokenizer, arguments.processes)
        shutil.rmtree(tokenizer, ignore_errors=True)


if __name__ == "__main__":
    main()
