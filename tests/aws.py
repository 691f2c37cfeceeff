"""AWS on this machine: moto's server stands for its API, in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ACCOUNT = "123456789012"
REGION = "us-east-1"
BUCKET = f"azrecipe-{ACCOUNT}-{REGION}"
ROLE = "azrecipe-training"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def loopback(folder: Path) -> Iterator[str]:
    """The address of an AWS with nothing in it; the environment leads there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with (folder / "moto.log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(line, stdout=log, stderr=log, env=dict(os.environ))
        try:
            for _ in range(600):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield address
        finally:
            process.kill()
            process.wait()


def furnish() -> None:
    """A role and a bucket, as docs/sagemaker.md makes them."""
    import boto3

    trust = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}],
    }
    boto3.client("iam").create_role(RoleName=ROLE, AssumeRolePolicyDocument=json.dumps(trust))
    boto3.client("s3").create_bucket(Bucket=BUCKET)


def keys(prefix: str = "") -> dict[str, int]:
    """Sizes of what is in the bucket, by key."""
    import boto3

    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", [])}


@contextmanager
def refusing(address: str, action: str, code: str, message: str) -> Iterator[str]:
    """The address of an AWS that refuses one action of SageMaker's, as the real one words it, and passes all else on."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("X-Amz-Target", "").endswith(f".{action}"):
                self._answer(400, json.dumps({"__type": code, "message": message}).encode(), {"Content-Type": "application/x-amz-json-1.1"})
                return
            import requests

            said = requests.request(self.command, address + self.path, headers=dict(self.headers), data=body, timeout=60)
            self._answer(said.status_code, said.content, dict(said.headers))

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "server", "date", "transfer-encoding", "content-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        there = f"http://127.0.0.1:{server.server_address[1]}"
        patch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", there)
        try:
            yield there
        finally:
            server.shutdown()
