"""What the tokenizer stage costs: training against the bare library, memory as the corpus grows, a sweep against trainings, measuring.

    python benchmarks/tokenizer.py [--megabytes 100] [--large 1000] [--vocab-size 100000] [--only train memory sweep measure]

The text is made here, from a seed: words of syllables, Zipf's law over their frequency, suffixes. Each figure comes from a process
of its own. Peak memory is the process' largest resident size. Prints machine, versions and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEED = 42
TYPES = 1_200_000
SIZES = (16_000, 32_000, 50_000, 64_000, 80_000, 100_000)


def make_text(file: Path, megabytes: int) -> None:
    """Documents of about 2,000 bytes, one JSON object a line."""
    random = np.random.Generator(np.random.PCG64(SEED))
    syllables = np.array([a + b + c for a in "bcçdfgğhklmnpqrstvyzşx" for b in "aeəıioöuü" for c in ("", "", "n", "r", "l")])
    suffixes = np.array(["", "", "", "lar", "lər", "da", "də", "ımız", "imiz", "dan", "dən", "ın", "in", "ların", "lərdən", "'da"])
    words = np.array(
        ["".join(w) for w in zip(*(random.choice(syllables, TYPES) for _ in range(3)), random.choice(suffixes, TYPES), strict=True)]
    )
    chance = 1 / np.arange(1, TYPES + 1) ** 1.05
    cumulative = np.cumsum(chance / chance.sum())
    written = 0
    with file.open("w", encoding="utf-8") as out:
        while written < megabytes * 1_000_000:
            drawn = words[np.minimum(np.searchsorted(cumulative, random.random(100_000)), TYPES - 1)]
            for start in range(0, len(drawn), 200):
                text = " ".join(drawn[start : start + 200]) + "."
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())


def read(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def bare(file: Path, vocab_size: int) -> None:
    """The library by itself, as its documentation trains a byte-level BPE."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(read(file), trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))


def ours(file: Path, sizes: tuple[int, ...], kind: str = "custom") -> None:
    """The stage's own way: mixed, hashed against the held-out documents, special tokens cut out."""
    from azrecipe.data import tokenizer_corpus
    from azrecipe.data.readers import DataSource
    from azrecipe.errors import SourceLocation
    from azrecipe.recipe.types import TextSource
    from azrecipe.tokenization import bpe_training, candidates, tokenizer

    base = bpe_training.train_llama3((text for text, _ in zip(read(file), range(500), strict=False)), 2_000)
    text = tokenizer_corpus.TokenizerCorpus(
        [DataSource(TextSource(str(file), "train"), SourceLocation("benchmark"))], None, frozenset([b""]), tokenizer.list_added_tokens(base)
    )
    made = candidates.train_family(base, candidates.CandidateFamily(kind, "base", None, {str(size): size for size in sizes}), text)
    print("  sizes reached:", ", ".join(f"{len(tokenizer):,}" for tokenizer, _ in made.values()))


def measuring(file: Path, processes: int) -> None:
    """Counting, without the time that processes take to start."""
    from azrecipe.tokenization import bpe_training
    from azrecipe.tokenization.tokenizer_metrics import count_tokens
    from azrecipe.utils.process_pool import WorkerPool

    texts = list(read(file))
    tokenizer = bpe_training.train_llama3(texts[:5000], 20_000)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with WorkerPool(processes, alone=0) as workers:
        count_tokens(workers, tokenizer, {"warm": texts[:2000]})
        began = time.perf_counter()
        count_tokens(workers, tokenizer, {"text": texts})
        print(f"  {processes} processes: {sum(len(t.encode()) for t in texts) / 1e6 / (time.perf_counter() - began):.2f} MB/s")


def alone(function: str, *arguments: Any) -> tuple[float, int]:
    """Run a function of this file in a process of its own; returns wall seconds without imports, and peak bytes."""
    done = subprocess.run(
        [sys.executable, __file__, "--run", json.dumps([function, *map(str, arguments)])], stdout=subprocess.PIPE, text=True, check=True
    )
    *printed, last = done.stdout.splitlines()
    print(*printed, sep="\n", end="\n" if printed else "")
    seconds, peak = json.loads(last)
    return seconds, peak


def run(function: str, file: str, *rest: str) -> None:
    import azrecipe.tokenization.candidates  # noqa: F401 (imports are not what is measured)

    calls = {
        "bare": lambda: bare(Path(file), int(rest[0])),
        "ours": lambda: ours(Path(file), tuple(json.loads(rest[0]))),
        "six": lambda: [ours(Path(file), (size,)) for size in json.loads(rest[0])],
        "extension": lambda: ours(Path(file), tuple(json.loads(rest[0])), "extension"),
        "measuring": lambda: measuring(Path(file), int(rest[0])),
    }
    began = time.perf_counter()
    calls[function]()
    print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--large", type=int, default=1000)
    parser.add_argument("--vocab-size", type=int, default=100_000)
    parser.add_argument("--only", nargs="+", default=["train", "memory", "sweep", "measure"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(*json.loads(arguments.run))
        return
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, tokenizers {version('tokenizers')}, seed {SEED}"
    )
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.jsonl"), Path(folder, "large.jsonl")
        make_text(small, arguments.megabytes)
        if "train" in arguments.only:
            for _ in range(2):
                a, b = alone("bare", small, arguments.vocab_size), alone("ours", small, [arguments.vocab_size])
                print(
                    f"training, {arguments.vocab_size:,} tokens on {arguments.megabytes} MB: bare {a[0]:.1f} s, ours {b[0]:.1f} s, ratio {b[0] / a[0]:.2f}"
                )
        if "memory" in arguments.only:
            middle = Path(folder, "middle.jsonl")
            make_text(middle, 3 * arguments.megabytes)
            make_text(large, arguments.large)
            sizes: dict[str, tuple[Path, int, Any]] = {
                "bare": (large, arguments.large, 32_000),
                "ours": (large, arguments.large, [32_000]),
                "extension": (middle, 3 * arguments.megabytes, [8_000]),
            }
            for function, (other, megabytes, size) in sizes.items():
                a, b = alone(function, small, size), alone(function, other, size)
                print(
                    f"memory, {function}: {arguments.megabytes} MB {a[1] / 1e6:.0f} MB, {megabytes} MB {b[1] / 1e6:.0f} MB, "
                    f"ratio {b[1] / a[1]:.2f}; {a[0]:.0f} s and {b[0]:.0f} s",
                    flush=True,
                )
            for file in (small, middle, large):
                print(f"  distinct words in {file.stem}: {len({w for text in read(file) for w in text.split()}):,}")
        if "sweep" in arguments.only:
            sizes = list(SIZES)
            a, b = alone("six", small, sizes), alone("ours", small, sizes)
            print(f"six sizes: six trainings {a[0]:.1f} s, one sweep {b[0]:.1f} s, {a[0] / b[0]:.1f} times faster")
        if "measure" in arguments.only:
            for workers in (1, os.cpu_count() or 1):
                alone("measuring", small, workers)


if __name__ == "__main__":
    main()
