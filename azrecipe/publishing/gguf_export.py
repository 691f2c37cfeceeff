"""`azrecipe export`: write a model as GGUF with llama.cpp's converter."""

from __future__ import annotations

import argparse
import json
import math
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

from azrecipe.errors import EXIT_SUCCESS, CannotRun, CommandError, Interrupted, RunFailed
from azrecipe.publishing import gguf_converter
from azrecipe.runs import finished_model
from azrecipe.utils.atomic_files import atomic_file, read_json
from azrecipe.utils.console import print_line, print_progress

CONVERTER_SCRIPT = "convert_hf_to_gguf.py"
BYTES_PER_PARAMETER: Mapping[str, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.07, "tq1_0": 0.3, "tq2_0": 0.35, "auto": 2}
UNKNOWN_PRE_TOKENIZER = "pre-tokenizer was not recognized"  # in the converter's output
INSTALL_COMMAND = "pip install gguf sentencepiece protobuf"
LLAMA_BPE = "llama-bpe"  # llama.cpp's name of Llama 3's split rule


def export_gguf(arguments: argparse.Namespace) -> int:
    """Convert a model to GGUF; return the exit code."""
    from azrecipe.modeling.loading import check_weight_files

    model = finished_model.resolve_model(arguments.model)
    script = _find_converter(arguments.llama_cpp)
    output = arguments.output or model.output_dir / f"{model.name.replace('/', '-')}-{arguments.outtype}.gguf"
    if output.exists() and not arguments.force:
        raise CommandError(f"{output} exists already: --force replaces it, --output gives another name")
    if not output.resolve().parent.is_dir():
        raise CommandError(f"--output: there is no folder {output.resolve().parent}")
    model = finished_model.download_model(model)
    check_weight_files(model.path)
    _check_disk(model, output, arguments.outtype)
    pre_tokenizer = _read_pre_tokenizer(model)
    if pre_tokenizer.warning:
        print_progress(pre_tokenizer.warning)
    with atomic_file(output.resolve()) as tmp:
        command = _build_command(script, model, pre_tokenizer, ["--outfile", str(tmp), "--outtype", arguments.outtype])
        print_progress(shlex.join(command))
        _run_converter(command, pre_tokenizer)
        if not tmp.is_file() or tmp.open("rb").read(4) != b"GGUF":
            raise RunFailed(f"{script} ended without an error and wrote no GGUF file")
    print_line(output)
    return EXIT_SUCCESS


def _find_converter(folder: Path | None) -> Path:
    """Find the converter.

    Raises CannotRun, with the commands that install it.
    """
    if folder is not None:
        script = folder.expanduser() / CONVERTER_SCRIPT
        if not script.is_file():
            raise CommandError(f"--llama-cpp: there is no {script}: give a checkout of llama.cpp")
        return script.resolve()
    on_path = shutil.which(CONVERTER_SCRIPT)
    if on_path is None:
        raise CannotRun(
            f"llama.cpp's converter, {CONVERTER_SCRIPT}, is not on PATH. Install it and its packages:\n"
            f"  git clone --depth 1 https://github.com/ggml-org/llama.cpp && {INSTALL_COMMAND}\n"
            "  azrecipe export … --llama-cpp llama.cpp"
        )
    return Path(on_path).resolve()


def _build_command(script: Path, model: finished_model.FinishedModel, pre_tokenizer: PreTokenizerInfo, options: Sequence[str]) -> list[str]:
    """Build the converter's command, with the pre-tokenizer if it has a name."""
    arguments = [*options, model.path]
    python = _find_interpreter(script)
    if python is None:
        return [str(script), *arguments]
    if pre_tokenizer.name is None:
        return [*python, str(script), *arguments]
    wrapper = str(Path(gguf_converter.__file__).resolve())
    return [*python, wrapper, str(script), pre_tokenizer.name, pre_tokenizer.architecture, *arguments]


def _find_interpreter(script: Path) -> list[str] | None:
    """Find the Python interpreter that a script's first line names.

    An installed script may have its own. Returns this interpreter for `env python` and no first line, None for another language.
    """
    with script.open("rb") as file:
        first_line = file.readline(500).decode(errors="replace").strip()
    if not first_line.startswith("#!"):
        return [sys.executable]
    words = shlex.split(first_line[2:])
    if not any("python" in Path(word).name for word in words):
        return None
    return [sys.executable] if Path(words[0]).name == "env" else words


@dataclass(frozen=True)
class PreTokenizerInfo:
    """A model's pre-tokenizer, as llama.cpp sees it.

    Attributes:
        name: llama.cpp's name of it; None where the converter must recognise it.
        architecture: The model's architecture in config.json.
        rule: Its split rule, for messages.
        warning: How llama.cpp tokenizes differently; empty where it does not.
    """

    name: str | None
    architecture: str
    rule: str
    warning: str = ""


def _read_pre_tokenizer(model: finished_model.FinishedModel) -> PreTokenizerInfo:
    """Read the pre-tokenizer from tokenizer.json.

    Llama 3's split rule is llama-bpe, whatever the vocabulary; custom vocabularies use it too.
    """
    from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT

    data: dict[str, Any] = read_json(Path(model.path) / "tokenizer.json") or {}
    architecture = (finished_model.read_model_config(model).get("architectures") or ["LlamaForCausalLM"])[0]
    settings = data.get("pre_tokenizer") or {}
    parts = settings.get("pretokenizers") or [settings]
    rules = [part.get("pattern", {}).get("Regex", "") for part in parts if part.get("type") == "Split"]
    rule = rules[0] if rules else json.dumps(settings, ensure_ascii=False)
    is_byte_level = any(part.get("type") == "ByteLevel" for part in parts)
    if rules != [LLAMA3_SPLIT] or not is_byte_level or data.get("normalizer"):
        return PreTokenizerInfo(None, architecture, rule)
    if data["model"].get("ignore_merges"):
        return PreTokenizerInfo(LLAMA_BPE, architecture, rule)
    return PreTokenizerInfo(LLAMA_BPE, architecture, rule, _warn_about_merges(model))


def _warn_about_merges(model: finished_model.FinishedModel) -> str:
    """Return a warning for a tokenizer without ignore_merges, or "".

    llama.cpp never splits a word that is a token.
    """
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(Path(model.path) / "tokenizer.json"))
    added_tokens = {token.content for token in bpe.get_added_tokens_decoder().values()}
    split_words = [token for token in bpe.get_vocab() if token not in added_tokens and len(bpe.model.tokenize(token)) != 1]
    if not split_words:
        return ""
    return f"llama.cpp never splits a word that is a token. This tokenizer's merges cut {len(split_words):,} such words, so llama.cpp tokenizes them differently"


def _check_disk(model: finished_model.FinishedModel, output: Path, outtype: str) -> None:
    from safetensors import safe_open

    num_parameters = 0
    for file in Path(model.path).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            num_parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - no mapping
    needed, free = round(num_parameters * BYTES_PER_PARAMETER[outtype]), shutil.disk_usage(output.resolve().parent).free
    if needed > free:
        raise CannotRun(f"{output} needs about {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free: --output on another one")


def _run_converter(command: Sequence[str], pre_tokenizer: PreTokenizerInfo) -> None:
    """Run the converter, and pass its output on to stderr.

    Raises RunFailed or CannotRun, with advice, where it fails.
    """
    last_lines: deque[str] = deque(maxlen=60)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CannotRun(f"{command[0]} cannot be started: {error.strerror}") from None
    old_handler = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            last_lines.append(line.rstrip())
            print_progress(line.rstrip("\n"))
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, old_handler)
        if child.poll() is None:
            child.terminate()
            child.wait()
    if code != 0:
        _raise_converter_error(code, list(last_lines), pre_tokenizer)


def _raise_terminated(number: int, _frame: Any) -> None:
    raise Interrupted("interrupted; nothing was written", 128 + number)


def _raise_converter_error(code: int, last_lines: Sequence[str], pre_tokenizer: PreTokenizerInfo) -> None:
    output = "\n".join(last_lines)
    if UNKNOWN_PRE_TOKENIZER in output and pre_tokenizer.name is None:
        raise RunFailed(
            "llama.cpp does not know how this tokenizer cuts text, so its GGUF would give other tokens than the model was trained on.\n"
            f"  Its split rule: {pre_tokenizer.rule}\n"
            "  llama.cpp has the rules of the tokenizers in its convert_hf_to_gguf_update.py only. A custom tokenizer with pre_tokenizer: base\n"
            "  or llama3 on a Llama 3 base is one of them; split_apostrophe_suffixes and keep_apostrophe_suffixes are not. Serve the model with\n"
            "  azrecipe serve, or train with a tokenizer whose rule llama.cpp has"
        )
    if UNKNOWN_PRE_TOKENIZER in output:
        raise RunFailed(
            f"the converter does not take the name {pre_tokenizer.name} for this tokenizer: azrecipe does not know this version of it. Another version of\n"
            "  llama.cpp may work; or add the hash that it printed to get_vocab_base_pre in your checkout, with "
            f'res = "{pre_tokenizer.name}"'
        )
    missing_module = next((line for line in reversed(last_lines) if line.startswith("ModuleNotFoundError")), None)
    if missing_module is not None:
        raise CannotRun(f"the converter needs a package that is missing ({missing_module.partition(': ')[2]}): {INSTALL_COMMAND}")
    if code < 0:
        name = signal.Signals(-code).name
        raise RunFailed(f"the converter was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; nothing was written")
    raise RunFailed(
        f"the converter failed (exit code {code}): {last_lines[-1] if last_lines else 'it printed nothing'}; nothing was written"
    )
