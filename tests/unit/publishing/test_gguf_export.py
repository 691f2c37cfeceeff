"""export, with a program on PATH that plays llama.cpp's converter: what is asked of it, and what its failures leave."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from azrecipe.publishing import gguf_export
from azrecipe.utils.atomic_files import read_json, write_json
from tests.conftest import Done, write

ARGUMENTS = "import sys\nfrom pathlib import Path\nout = Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
WORKS = ARGUMENTS + "out.write_bytes(b'GGUF' + ' '.join(sys.argv[1:]).encode())\n"
# Built as llama.cpp's converter is: a register of model classes, which ask for the name of a split rule that they may not know.
REGISTER = """
import sys
from pathlib import Path

class ModelBase:
    known = {}
    def __init_subclass__(cls):
        if "model_arch" not in cls.__dict__:
            raise TypeError("Missing property 'model_arch'")
    @classmethod
    def register(cls, *names):
        return lambda model: [cls.known.__setitem__(name, model) for name in names] and model
    @classmethod
    def from_model_architecture(cls, name):
        if name not in cls.known:
            raise NotImplementedError(name)
        return cls.known[name]

@ModelBase.register("LlamaForCausalLM")
class Llama(ModelBase):
    model_arch = "llama"
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")

def main():
    out = Path(sys.argv[sys.argv.index("--outfile") + 1])
    out.write_bytes(b"GGUF" + ModelBase.from_model_architecture("LlamaForCausalLM")().get_vocab_base_pre(None).encode())

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a converter on PATH; a text without a first line of its own is Python."""

    def put(text: str) -> Path:
        file = write(tmp_path / "bin" / gguf_export.CONVERTER_SCRIPT, text if text.startswith("#!") else f"#!/usr/bin/env python3\n{text}")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")
        return file

    return put


@pytest.fixture
def exported(cli: Callable[..., Done], model: Path, tmp_path: Path) -> Callable[..., tuple[Done, Path]]:
    """Run export into a folder of its own; nothing but the file asked for may be left there."""

    def call(*arguments: Any) -> tuple[Done, Path]:
        output = tmp_path / "out" / "model.gguf"
        output.parent.mkdir(exist_ok=True)
        before = set(output.parent.iterdir())
        done = cli("export", model, "--output", output, *arguments)
        assert set(output.parent.iterdir()) <= before | {output}
        return done, output

    return call


def test_the_converter_writes_the_file(exported: Callable[..., tuple[Done, Path]], converter: Callable[[str], Path], model: Path) -> None:
    converter(WORKS)
    done, output = exported("--outtype", "q8_0")
    assert done.code == 0, done.err
    assert done.out == f"{output}\n"
    words = output.read_bytes().removeprefix(b"GGUF").decode().split()
    assert words[words.index("--outtype") + 1] == "q8_0" and words[-1] == str(model)


def test_a_checkout_is_taken_where_it_is_named(
    exported: Callable[..., tuple[Done, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    write(tmp_path / "llama.cpp" / gguf_export.CONVERTER_SCRIPT, WORKS)  # no first line and not executable
    done, output = exported("--llama-cpp", tmp_path / "llama.cpp")
    assert done.code == 0 and output.is_file()
    done, _ = exported("--llama-cpp", tmp_path / "elsewhere", "--force")
    assert done.code == 2 and "checkout of llama.cpp" in done.err


def test_without_a_converter_it_says_what_to_install(exported: Callable[..., tuple[Done, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done, _ = exported()
    assert done.code == 3
    assert "git clone" in done.err and "pip install gguf" in done.err and "--llama-cpp" in done.err


def test_a_custom_vocabulary_with_llama_3s_rule_is_told_to_the_converter(
    exported: Callable[..., tuple[Done, Path]], converter: Callable[[str], Path]
) -> None:
    converter(REGISTER)
    done, output = exported()
    assert done.code == 0, done.err
    assert output.read_bytes() == b"GGUFllama-bpe"


def test_another_split_rule_is_refused_with_the_rule(
    exported: Callable[..., tuple[Done, Path]], converter: Callable[[str], Path], model: Path
) -> None:
    from azrecipe.tokenization.tokenizer import SPLIT_RULES

    tokenizer = read_json(model / "tokenizer.json")
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = SPLIT_RULES["keep_apostrophe_suffixes"]
    write_json(model / "tokenizer.json", tokenizer)
    converter(REGISTER)
    done, output = exported()
    assert done.code == 1 and not output.exists()
    assert SPLIT_RULES["keep_apostrophe_suffixes"] in done.err and "azrecipe serve" in done.err


def test_words_that_llama_cpp_would_cut_otherwise_are_counted(model: Path) -> None:
    from tokenizers import Tokenizer

    from azrecipe.runs.finished_model import FinishedModel

    found = gguf_export._read_pre_tokenizer(FinishedModel(str(model)))
    assert found.name == "llama-bpe" and found.warning == ""  # every token of this vocabulary is what its own merges give
    tokenizer = read_json(model / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["zzqx"] = max(vocabulary.values()) + 1
    write_json(model / "tokenizer.json", tokenizer)
    assert len(Tokenizer.from_file(str(model / "tokenizer.json")).encode("zzqx", add_special_tokens=False).ids) > 1
    assert "cut 1 such words" in gguf_export._read_pre_tokenizer(FinishedModel(str(model))).warning


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("print('Model XForCausalLM is not supported')\nraise SystemExit(1)", 1, "XForCausalLM is not supported"),
        (ARGUMENTS + "import os\nout.write_bytes(b'GGUF')\nos.kill(os.getpid(), 9)", 1, "SIGKILL"),
        ("pass", 1, "wrote no GGUF"),
        (ARGUMENTS + "out.write_bytes(b'half')", 1, "wrote no GGUF"),
        ("import a_package_that_is_not_there", 3, "pip install gguf"),
        ("#!/bin/sh\necho broken >&2\nexit 4", 1, "exit code 4"),
    ],
    ids=["fails", "killed half-way", "writes nothing", "writes something else", "lacks a package", "is a shell script"],
)
def test_a_failure_leaves_nothing_and_an_older_file_as_it_was(
    exported: Callable[..., tuple[Done, Path]], converter: Callable[[str], Path], program: str, code: int, words: str
) -> None:
    converter(program)
    done, output = exported()
    assert (done.code, output.exists()) == (code, False)
    assert words in done.err
    write(output, "an older file")
    done, _ = exported("--force")
    assert done.code == code and output.read_text() == "an older file"


def test_an_existing_file_is_replaced_only_when_asked(
    exported: Callable[..., tuple[Done, Path]], converter: Callable[[str], Path], tmp_path: Path
) -> None:
    converter(WORKS)
    output = write(tmp_path / "out" / "model.gguf", "mine")
    done, _ = exported()
    assert done.code == 2 and "--force" in done.err and output.read_text() == "mine"
    done, _ = exported("--force")
    assert done.code == 0 and output.read_bytes().startswith(b"GGUF")


def test_what_a_killed_export_left_is_swept_away(
    exported: Callable[..., tuple[Done, Path]], converter: Callable[[str], Path], tmp_path: Path
) -> None:
    import os
    import socket
    import subprocess

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = write(tmp_path / "out" / f".model.gguf.{socket.gethostname()}.{ended.pid}.tmp", "half")
    other = write(tmp_path / "out" / f".model.gguf.{socket.gethostname()}.{os.getppid()}.tmp", "another export, which still runs")
    converter(WORKS)
    done, _ = exported()
    assert done.code == 0 and not left.exists() and other.exists()
