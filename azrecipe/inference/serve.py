"""`azrecipe serve`: serve a model with an OpenAI-compatible API.

The server is `transformers serve` or vLLM, behind a front that checks requests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys

from azrecipe.errors import CannotRun, CommandError
from azrecipe.recipe.extras import get_install_command, list_missing_modules
from azrecipe.runs import finished_model
from azrecipe.utils.console import print_progress
from azrecipe.utils.environment_variables import API_KEY, SERVE_SETTINGS
from azrecipe.utils.python_command import build_python_command

ENGINE_EXTRAS = {"transformers": "serve", "vllm": "vllm"}  # of recipe.extras


def run_server(arguments: argparse.Namespace) -> int:
    """Replace this process by the server.

    Signals reach the server, and the exit code is the server's.
    """
    from azrecipe.modeling.loading import check_weight_files

    model = finished_model.resolve_model(arguments.model)
    command = build_server_command(model, arguments.engine, arguments.host, arguments.port)
    if model.is_local:  # the engine would fill missing weights with random numbers
        check_weight_files(model.path)
    _check_engine(arguments.engine)
    if arguments.api_key:
        os.environ[API_KEY.name] = arguments.api_key  # not on the server's command line, which other users of the machine can read
    os.environ[SERVE_SETTINGS.name] = json.dumps(
        {
            "path": model.path,
            "engine_name": model.name if arguments.engine == "vllm" else model.path,
            "names": [model.name, model.path],
            "timeout": arguments.timeout,
        }
    )
    _check_port(arguments.host, arguments.port)
    if model.is_local and not finished_model.has_chat_template(model):
        print_progress(f"{model.path} has no chat template: /v1/completions continues text; /v1/chat/completions is refused")
    print_progress(" ".join(command))
    print_progress(f"when it listens, try:\n  {build_curl_command(model, arguments.host, arguments.port)}")
    sys.stdout.flush()
    os.execv(command[0], command)


def build_server_command(model: finished_model.FinishedModel, engine: str, host: str, port: int) -> list[str]:
    """Build the server's command.

    Args:
        model: The model to serve.
        engine: transformers or vllm.
        host: The address to listen on.
        port: The port to listen on.

    Raises:
        CommandError: transformers serve would misread the model's path.
    """
    if engine == "vllm":
        return build_python_command("vllm.entrypoints.cli.main", "serve", model.path, "--host", host, "--port", str(port),
                                    "--middleware", "azrecipe.inference.serve_engine.FrontMiddleware", "--served-model-name", model.name)  # fmt: skip
    if "@" in model.path or model.path.endswith(".gguf"):
        raise CommandError(
            f"transformers serve reads what follows an @ as a revision: {model.path} cannot be served from there. Move it, or --engine vllm"
        )
    return build_python_command("azrecipe.inference.serve_engine", host, str(port))


def build_curl_command(model: finished_model.FinishedModel, host: str, port: int) -> str:
    """Build a curl command that sends the server a prompt.

    Args:
        model: The model that is served.
        host: The address that the server listens on.
        port: Its port.
    """
    address = "localhost" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    chat = not model.is_local or finished_model.has_chat_template(model)
    body = {"messages": [{"role": "user", "content": "Salam!"}]} if chat else {"prompt": "Salam"}
    data = json.dumps({"model": model.name, **body, "max_tokens": 64}, ensure_ascii=False).replace("'", r"'\''")
    key = f' -H "Authorization: Bearer ${API_KEY}"' if API_KEY.is_set else ""
    return f"curl http://{address}:{port}/v1/{'chat/' if chat else ''}completions{key} -H 'Content-Type: application/json' -d '{data}'"


def _check_engine(engine: str) -> None:
    missing = list_missing_modules(ENGINE_EXTRAS[engine])
    if missing:
        name = engine if engine == "vllm" else "transformers serve"
        raise CannotRun(f"{name} needs {', '.join(missing)}, not installed here: {get_install_command(ENGINE_EXTRAS[engine])}")


def _check_port(host: str, port: int) -> None:
    """Raise CannotRun where the server could not listen.

    The server itself would find out only after it has loaded the model.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise CannotRun(f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host") from None
