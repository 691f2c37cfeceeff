"""What the hub can answer, said by a real HTTP server on loopback: gated, unknown, and not there at all."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Done

RECIPE = """\
stage: pretrain
project: p
model: {name_or_path: meta-llama/Llama-3.2-1B}
data: {max_length: 32, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
training: {global_batch_size: 2, precision: float32}
"""


@pytest.fixture
def hub() -> Iterator[Callable[[int, str], str]]:
    """Start a hub that answers every request with one status and error code; returns its address."""
    servers = []

    def start(status: int, code: str) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", "Access to this is restricted.")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ANSWERS = {
    "gated": (403, "GatedRepo", "meta-llama/Llama-3.2-1B is gated: accept its licence at https://huggingface.co/meta-llama/Llama-3.2-1B"),
    "unknown": (401, "RepoNotFound", "the hub has no meta-llama/Llama-3.2-1B, or hides it from you"),
}


@pytest.mark.parametrize("answer", ["gated", pytest.param("unknown", marks=pytest.mark.long)])
def test_a_model_that_the_hub_does_not_give(
    project: Path, run_cli: Callable[..., Done], hub: Callable[[int, str], str], answer: str
) -> None:
    status, code, says = ANSWERS[answer]
    (project / "r.yaml").write_text(RECIPE)
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub(status, code), "HF_HOME": str(project / "hf"), "NO_PROXY": "127.0.0.1"}
    done = run_cli("run", "r.yaml", env=environment)
    assert done.code == 3, done.text
    assert says in done.err
    assert "hf auth login" in done.err
    assert "Traceback" not in done.text
    assert not (project / "runs" / "p" / "r").exists()
