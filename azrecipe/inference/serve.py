"""`azrecipe serve`: an OpenAI-compatible endpoint. Knows the command lines of the servers that there are, and what they need."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from azrecipe.errors import CannotRun, CommandError
from azrecipe.runs import finished_model
from azrecipe.utils.console import say

# What transformers' is_serve_available() asks for, and vLLM.
NEEDS: Mapping[str, Sequence[str]] = {"transformers": ("fastapi", "uvicorn", "pydantic", "openai"), "vllm": ("vllm",)}
INSTALL = {"transformers": "pip install 'azrecipe[serve]'", "vllm": "pip install vllm"}


def run(arguments: argparse.Namespace) -> int:
    """Become the server: this process is replaced, so that signals and the exit code are the server's own."""
    model = finished_model.find(arguments.model)
    command = line(model, arguments.engine, arguments.host, arguments.port)
    _check_engine(arguments.engine)
    _check_port(arguments.host, arguments.port)
    if model.local and not finished_model.has_template(model):
        say(f"{model.path} has no chat template: /v1/completions continues text; /v1/chat/completions is refused")
    say(" ".join(command))
    say(f"when it listens, try:\n  {curl(model, arguments.engine, arguments.host, arguments.port)}")
    sys.stdout.flush()
    os.execv(command[0], command)


def line(model: finished_model.Finished, engine: str, host: str, port: int) -> list[str]:
    """The server's command line. Raises CommandError for a folder whose name transformers serve would take apart."""
    if engine == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model.path, "--host", host, "--port", str(port),
                "--served-model-name", served(model, engine)]  # fmt: skip
    if "@" in model.path or model.path.endswith(".gguf"):
        raise CommandError(
            f"transformers serve reads what follows an @ as a revision: {model.path} cannot be served from there. Move it, or --engine vllm"
        )
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", model.path, "--host", host, "--port", str(port)]


def served(model: finished_model.Finished, engine: str) -> str:
    """The model's name in a request: transformers serve knows it by its folder only."""
    return model.path if engine == "transformers" else model.name


def curl(model: finished_model.Finished, engine: str, host: str, port: int) -> str:
    """A command line that asks the server something."""
    near = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    chat = not model.local or finished_model.has_template(model)
    body = {"messages": [{"role": "user", "content": "Salam!"}]} if chat else {"prompt": "Salam"}
    data = json.dumps({"model": served(model, engine), **body, "max_tokens": 64}, ensure_ascii=False).replace("'", r"'\''")
    return f"curl http://{near}:{port}/v1/{'chat/' if chat else ''}completions -H 'Content-Type: application/json' -d '{data}'"


def _check_engine(engine: str) -> None:
    missing = [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(
            f"{engine if engine == 'vllm' else 'transformers serve'} needs {', '.join(missing)}, not installed here: {INSTALL[engine]}"
        )


def _check_port(host: str, port: int) -> None:
    """Raise CannotRun where the address cannot be listened at: the server would say so only once the model is loaded."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(kind)) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise CannotRun(f"cannot listen at {host}:{port}: {error.strerror or error}. Choose another --port or --host") from None
