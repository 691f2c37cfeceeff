"""serve: the server's command line, and what is refused before it starts; the server itself where its packages are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import CannotRun, CommandError
from azrecipe.inference import serve
from azrecipe.recipe.extras import is_installed
from azrecipe.runs import finished_model
from tests.conftest import ROOT, Done

INSTALLED = is_installed("serve")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def asked(command: str) -> tuple[str, Any]:
    """The address and the body of a curl command."""
    words = shlex.split(command)
    assert words[0] == "curl"
    return words[1], json.loads(words[words.index("-d") + 1])


def test_the_servers_are_started_with_the_models_folder(llama: Path) -> None:
    model = finished_model.resolve_model(str(llama))
    command = serve.build_server_command(model, "transformers", "0.0.0.0", 8123)
    assert command == [sys.executable, "-P", "-m", "azrecipe.inference.serve_engine", "0.0.0.0", "8123"]
    command = serve.build_server_command(model, "vllm", "localhost", 8123)
    assert command[command.index("serve") + 1] == str(llama) and command[-2:] == ["--served-model-name", "llama"]


def test_the_line_to_try_asks_what_the_model_can_answer(llama: Path) -> None:
    address, body = asked(serve.build_curl_command(finished_model.resolve_model(str(llama)), "0.0.0.0", 8123))
    assert address == "http://localhost:8123/v1/completions"  # it has no chat template
    assert body["model"] == "llama" and body["prompt"]
    address, body = asked(serve.build_curl_command(finished_model.FinishedModel("meta/model"), "::1", 80))
    assert address == "http://[::1]:80/v1/chat/completions" and body["messages"][0]["role"] == "user"


def test_a_folder_that_transformers_serve_would_take_apart_is_refused(llama: Path, tmp_path: Path) -> None:
    model = finished_model.resolve_model(str(shutil.copytree(llama, tmp_path / "model@2")))
    with pytest.raises(CommandError, match="revision"):
        serve.build_server_command(model, "transformers", "localhost", 8000)
    assert str(tmp_path / "model@2") in serve.build_server_command(model, "vllm", "localhost", 8000)


def test_an_address_that_is_taken_is_refused_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CannotRun, match="--port"):
            serve._check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(CannotRun, match="--host"):
        serve._check_port("no.such.host.invalid", 8000)


@pytest.mark.skipif(INSTALLED, reason="the packages of transformers serve are installed")
def test_without_its_packages_the_pip_line_is_given(cli: Callable[..., Done], llama: Path) -> None:
    done = cli("serve", llama)
    assert done.code == 3 and "pip install 'azrecipe[serve]'" in done.err and "openai" in done.err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_pip_line_is_given(cli: Callable[..., Done], llama: Path) -> None:
    done = cli("serve", llama, "--engine", "vllm")
    assert done.code == 3 and "pip install vllm" in done.err


def check_answers(address: str, body: dict[str, Any]) -> None:
    """Ask a server with openai's own client, and past it."""
    import openai

    client = openai.OpenAI(base_url=address.removesuffix("/completions"), api_key="key", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == [body["model"]]
    answer = client.completions.create(model=body["model"], prompt=body["prompt"], max_tokens=4)
    assert answer.usage is not None and answer.usage.completion_tokens <= 4 and answer.choices
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(model=body["model"], prompt="Salam", max_tokens=8, temperature=0, stream=True))  # fmt: skip
    whole = client.completions.create(model=body["model"], prompt="Salam", max_tokens=8, temperature=0)
    assert streamed == whole.choices[0].text and whole.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="context is 256 tokens"):
        client.completions.create(model=body["model"], prompt="Salam " * 20_000, max_tokens=4)
    assert client.completions.create(model=body["model"], prompt="Salam", max_tokens=10**9).usage.total_tokens <= 256  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model=body["model"], messages=[{"role": "user", "content": "Salam"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.post("/../load_model", body={"model": "/"}, cast_to=object)

    def ask(number: int) -> str:
        return client.completions.create(model=body["model"], prompt=f"Salam {number % 4}", max_tokens=6, temperature=0).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(160)))
    assert len(answers) == 160 and len(set(answers)) <= 4


@pytest.mark.long
@pytest.mark.skipif(not INSTALLED, reason="needs the packages of transformers serve: pip install 'azrecipe[serve]'")
def test_the_server_answers_over_http_and_ends_with_its_signal(llama: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "azrecipe", "serve", str(llama), "--port", str(port), "--api-key", "key"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    try:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until and "running on" not in (tmp_path / "log").read_text():
            time.sleep(0.1)
        text = (tmp_path / "log").read_text()
        address, body = asked(next(line.strip() for line in text.splitlines() if line.strip().startswith("curl")))
        check_answers(address, body)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
        log.close()
