"""`azrecipe export`: a model as GGUF. Knows where llama.cpp's converter is, what it needs, and what its failures mean."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.errors import DONE, CannotRun, CommandError, Interrupted, RunFailed
from azrecipe.publishing import gguf_converter
from azrecipe.runs import finished_model
from azrecipe.utils.atomic_files import read_json, whole_file
from azrecipe.utils.console import say

SCRIPT = "convert_hf_to_gguf.py"
BYTES: Mapping[str, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.07, "tq1_0": 0.3, "tq2_0": 0.35, "auto": 2}  # a parameter
UNKNOWN_SPLIT = "pre-tokenizer was not recognized"
NEEDED = "pip install gguf sentencepiece protobuf"
LLAMA_BPE = "llama-bpe"  # llama.cpp's name of Llama 3's split rule


def run(arguments: argparse.Namespace) -> int:
    """Convert, aside, and rename; returns the exit code."""
    model = finished_model.find(arguments.model)
    script = _script(arguments.llama_cpp)
    output = arguments.output or model.beside / f"{model.name.replace('/', '-')}-{arguments.outtype}.gguf"
    if output.exists() and not arguments.force:
        raise CommandError(f"{output} is there already: --force replaces it, --output gives another name")
    if not output.resolve().parent.is_dir():
        raise CommandError(f"--output: there is no folder {output.resolve().parent}")
    model = finished_model.fetched(model)
    _check_disk(model, output, arguments.outtype)
    split = _split(model)
    if split.warning:
        say(split.warning)
    with whole_file(output.resolve()) as aside:
        command = _line(script, model, split, ["--outfile", str(aside), "--outtype", arguments.outtype])
        say(shlex.join(command))
        _run(command, split)
        if not aside.is_file() or aside.open("rb").read(4) != b"GGUF":
            raise RunFailed(f"{script} ended without an error and wrote no GGUF file")
    print(output)
    return DONE


def _script(folder: Path | None) -> Path:
    """The converter. Raises CannotRun, saying what to install."""
    if folder is not None:
        found = folder.expanduser() / SCRIPT
        if not found.is_file():
            raise CommandError(f"--llama-cpp: there is no {found}: give a checkout of llama.cpp")
        return found.resolve()
    on_path = shutil.which(SCRIPT)
    if on_path is None:
        raise CannotRun(
            f"llama.cpp's converter, {SCRIPT}, is not on PATH. Get it, and what it needs:\n"
            f"  git clone --depth 1 https://github.com/ggml-org/llama.cpp && {NEEDED}\n"
            "  azrecipe export … --llama-cpp llama.cpp"
        )
    return Path(on_path).resolve()


def _line(script: Path, model: finished_model.Finished, split: Split, options: Sequence[str]) -> list[str]:
    """The command: the converter as it is, or with the split rule's name told to it."""
    own = [*options, model.path]
    python = _python(script)
    if python is None:
        return [str(script), *own]
    if split.name is None:
        return [*python, str(script), *own]
    return [*python, str(Path(gguf_converter.__file__).resolve()), str(script), split.name, split.architecture, *own]


def _python(script: Path) -> list[str] | None:
    """The Python that a script asks for in its first line: an installed one may bring its own. This one for `env python`, None for none."""
    with script.open("rb") as file:
        first = file.readline(500).decode(errors="replace").strip()
    if not first.startswith("#!"):
        return [sys.executable]
    words = shlex.split(first[2:])
    if not any("python" in Path(word).name for word in words):
        return None
    return [sys.executable] if Path(words[0]).name == "env" else words


@dataclass(frozen=True)
class Split:
    """How a tokenizer cuts text, as far as llama.cpp is concerned. `name`: llama.cpp's, or None where the converter has to know."""

    name: str | None
    architecture: str
    rule: str
    warning: str = ""


def _split(model: finished_model.Finished) -> Split:
    """Look at tokenizer.json. Llama 3's rule, which custom vocabularies have too, is llama-bpe whatever the tokens are."""
    from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT

    data: dict[str, Any] = read_json(Path(model.path) / "tokenizer.json") or {}
    architecture = (finished_model.settings(model).get("architectures") or ["LlamaForCausalLM"])[0]
    pre = data.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or [pre]
    rules = [part.get("pattern", {}).get("Regex", "") for part in parts if part.get("type") == "Split"]
    rule = rules[0] if rules else json.dumps(pre, ensure_ascii=False)
    byte_level = any(part.get("type") == "ByteLevel" for part in parts)
    if rules != [LLAMA3_SPLIT] or not byte_level or data.get("normalizer"):
        return Split(None, architecture, rule)
    if data["model"].get("ignore_merges"):
        return Split(LLAMA_BPE, architecture, rule)
    return Split(LLAMA_BPE, architecture, rule, _whole_words(model))


def _whole_words(model: finished_model.Finished) -> str:
    """What is different for a tokenizer without ignore_merges: llama.cpp takes a word that is a token whole, always."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(Path(model.path) / "tokenizer.json"))
    added = {token.content for token in bpe.get_added_tokens_decoder().values()}
    unreached = [token for token in bpe.get_vocab() if token not in added and len(bpe.model.tokenize(token)) != 1]
    if not unreached:
        return ""
    return f"llama.cpp takes a word that is a token whole, and this tokenizer cuts {len(unreached):,} such words by its merges: they are read otherwise there"


def _check_disk(model: finished_model.Finished, output: Path, outtype: str) -> None:
    from safetensors import safe_open

    parameters = 0
    for file in Path(model.path).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                size = 1
                for length in opened.get_slice(name).get_shape():
                    size *= length
                parameters += size
    needed, free = round(parameters * BYTES[outtype]), shutil.disk_usage(output.resolve().parent).free
    if needed > free:
        raise CannotRun(f"{output} needs about {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free: --output on another one")


def _run(command: Sequence[str], split: Split) -> None:
    """Run the converter, its lines passed on to stderr. Raises RunFailed or CannotRun, with what to do, where it does not end well."""
    last: deque[str] = deque(maxlen=60)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CannotRun(f"{command[0]} cannot be started: {error.strerror}") from None
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            last.append(line.rstrip())
            sys.stderr.write(line)
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if child.poll() is None:
            child.terminate()
            child.wait()
    if code != 0:
        _explain(code, list(last), split)


def _terminated(number: int, _frame: Any) -> None:
    raise Interrupted("interrupted; nothing was written", 128 + number)


def _explain(code: int, last: Sequence[str], split: Split) -> None:
    text = "\n".join(last)
    if UNKNOWN_SPLIT in text and split.name is None:
        raise RunFailed(
            "llama.cpp does not know how this tokenizer cuts text, so its GGUF would read other tokens than the model was trained on.\n"
            f"  Its split rule: {split.rule}\n"
            "  llama.cpp has the rules of the tokenizers in its convert_hf_to_gguf_update.py only. A custom tokenizer with pre_tokenizer: base\n"
            "  or llama3 on a Llama 3 base is one of them; split_apostrophe_suffixes and keep_apostrophe_suffixes are not. Serve the model with\n"
            "  azrecipe serve, or train with a tokenizer whose rule llama.cpp has"
        )
    if UNKNOWN_SPLIT in text:
        raise RunFailed(
            f"the converter does not take the name {split.name} for this tokenizer: it is built otherwise than azrecipe knows. Another version of\n"
            "  llama.cpp may do; or add the hash that it printed to get_vocab_base_pre in your checkout, with "
            f'res = "{split.name}"'
        )
    lacking = next((line for line in reversed(last) if line.startswith("ModuleNotFoundError")), None)
    if lacking is not None:
        raise CannotRun(f"the converter lacks a package ({lacking.partition(': ')[2]}): {NEEDED}")
    if code < 0:
        name = signal.Signals(-code).name
        raise RunFailed(f"the converter was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; nothing was written")
    raise RunFailed(f"the converter failed (exit code {code}): {last[-1] if last else 'it said nothing'}; nothing was written")
