"""The checked front of a server: an ASGI application around the engine's.

Only the endpoints of chats, completions, models and health are reachable. Whatever is wrong with a request is answered before the engine
sees it; an answer that nobody waits for any longer is ended.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from azrecipe.inference.serve_requests import CHAT, COMPLETION, RequestError, check_request, fit_context, join_chunks, parse_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
TokenCounter = Callable[[Mapping[str, Any]], int]
MAX_PENDING = 256  # requests at a time


@dataclass(frozen=True)
class FrontSettings:
    """What the front knows of the server.

    Attributes:
        engine_name: The model's name for the engine.
        names: The names that a request may use.
        context: The model's context, in tokens.
        api_key: What a client must send; "" for nothing.
        timeout: Seconds that a request may take.
        max_body_bytes: The largest request.
    """

    engine_name: str
    names: tuple[str, ...]
    context: int
    api_key: str = ""
    timeout: float = 600.0
    max_body_bytes: int = 4 * 2**20


class CheckedFront:
    """Checks requests and hands them to the engine's application.

    Args:
        engine: The engine's application.
        settings: The server's settings.
        count_tokens: Counts the tokens of a request's prompt; it raises RequestError.
    """

    def __init__(self, engine: Application, settings: FrontSettings, count_tokens: TokenCounter) -> None:
        self.engine, self.settings, self.count_tokens = engine, settings, count_tokens
        self.num_pending = 0
        self.started = int(time.time())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan":
            await self.engine(scope, receive, send)
        elif scope["type"] == "http":
            state = _ClientAnswer(send)
            try:
                await self._route(scope, receive, state)
            except RequestError as error:
                await state.fail(error)

    async def _route(self, scope: Message, receive: Receive, answer: _ClientAnswer) -> None:
        method, path = scope["method"], scope["path"]
        if (method, path) == ("GET", "/health"):
            return await answer.send_json(200, {"status": "ok"})
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_key(headers)
        if path in (CHAT, COMPLETION) and method == "POST":
            return await self._generate(scope, receive, answer, headers)
        if path == "/v1/models" and method == "GET":
            return await answer.send_json(200, {"object": "list", "data": [self._describe_model()]})
        if path.startswith("/v1/models/") and method == "GET" and path.removeprefix("/v1/models/") in self.settings.names:
            return await answer.send_json(200, self._describe_model())
        if path in (CHAT, COMPLETION, "/v1/models"):
            raise RequestError(405, f"{path} does not take {method}")
        raise RequestError(404, f"there is no {path}. There are {CHAT}, {COMPLETION}, /v1/models and /health")

    def _check_key(self, headers: Mapping[str, str]) -> None:
        key = headers.get("authorization", "").partition(" ")[2].strip()
        if self.settings.api_key and not hmac.compare_digest(key.encode("latin-1"), self.settings.api_key.encode()):
            raise RequestError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    def _describe_model(self) -> dict[str, Any]:
        return {"id": self.settings.names[0], "object": "model", "created": self.started, "owned_by": "azrecipe"}

    async def _generate(self, scope: Message, receive: Receive, answer: _ClientAnswer, headers: Mapping[str, str]) -> None:
        """Check a request, let the engine answer, and watch client and clock."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the body must be JSON, with Content-Type: application/json")
        if self.num_pending >= MAX_PENDING:
            raise RequestError(429, f"{MAX_PENDING} requests are being answered: try again later", code="rate_limit_exceeded")
        self.num_pending += 1
        try:
            body = parse_body(await self._read_body(receive, headers))
            name = body.get("model")
            if name is not None and name not in self.settings.names:
                raise RequestError(404, f"there is no such model here: it is {self.settings.names[0]}", "model", "model_not_found")
            request = check_request(body, scope["path"])
            prompt_tokens = await asyncio.to_thread(self.count_tokens, request)
            request = fit_context(request, prompt_tokens, self.settings.context)
            answer.start_answer(scope["path"], bool(request.get("stream")), str(name or self.settings.names[0]))
            data = json.dumps({**request, "model": self.settings.engine_name, "stream": True}).encode()
            await self._run_engine(scope, receive, answer, data)
        finally:
            self.num_pending -= 1

    async def _read_body(self, receive: Receive, headers: Mapping[str, str]) -> bytes:
        limit, body = self.settings.max_body_bytes, b""
        too_large = RequestError(413, f"the body is larger than {limit} bytes")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > limit:
            raise too_large
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the client has gone")
            body += bytes(message.get("body", b""))
            if len(body) > limit:
                raise too_large
            if not message.get("more_body"):
                return body

    async def _run_engine(self, scope: Message, receive: Receive, answer: _ClientAnswer, data: bytes) -> None:
        """Run the engine until answer, disconnect or time-out."""
        parts = [{"type": "http.request", "body": data, "more_body": False}]
        gone = asyncio.Event()

        async def receive_request() -> Message:
            if parts:
                return dict(parts.pop())
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name.lower() not in (b"content-length", b"transfer-encoding", b"authorization")
        ]
        inner = {**scope, "headers": [*headers, (b"content-length", str(len(data)).encode())]}
        work = asyncio.ensure_future(self.engine(inner, receive_request, answer.take))
        client = asyncio.ensure_future(watch_client())
        try:
            done, _ = await asyncio.wait((work, client), timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                if (error := work.exception()) is not None:
                    raise RequestError(500, f"the engine failed: {type(error).__name__}") from error
                await answer.finish()
            elif client not in done:
                raise RequestError(504, f"no answer within {self.settings.timeout:g} seconds", code="timeout")
        finally:
            gone.set()  # the engine hears that nobody waits, and ends the generation
            client.cancel()
            work.cancel()
            await asyncio.gather(work, client, return_exceptions=True)


class _ClientAnswer:
    """The answer to one request, as a stream or joined."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.endpoint, self.stream, self.model = "", False, ""
        self.status = 0  # of the engine
        self.is_sent = False  # whether the answer has begun
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.error: RequestError | None = None  # of the engine, within its stream

    def start_answer(self, endpoint: str, stream: bool, model: str) -> None:
        self.endpoint, self.stream, self.model = endpoint, stream, model

    async def take(self, message: Message) -> None:
        """Take a message of the engine."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.buffer += message.get("body", b"")
        if self.status != 200:
            return
        for event in self._iter_events():
            if "error" in event:
                self.error = RequestError(500, f"the engine failed: {event['error']}")
                return
            event["model"] = self.model
            self.events.append(event)
            if self.stream:
                await self._send_event(json.dumps(event))

    def _iter_events(self) -> Iterator[dict[str, Any]]:
        """Yield the events that are complete."""
        while b"\n\n" in self.buffer:
            block, _, self.buffer = self.buffer.partition(b"\n\n")
            text = block.decode("utf-8", "replace").removeprefix("data:").strip()
            if not text or text == "[DONE]":
                continue
            try:
                yield json.loads(text)
            except ValueError:
                yield {"error": text[:200]}

    async def finish(self) -> None:
        """Send what is left when the engine has ended."""
        if self.error is not None:
            raise self.error
        if self.status != 200:
            raise RequestError(400 if 400 <= self.status < 500 else 500, _read_engine_error(self.buffer))
        if self.stream:
            await self._send_event("[DONE]")
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self.send_json(200, join_chunks(self.events, self.endpoint, self.model))

    async def _send_event(self, text: str) -> None:
        if not self.is_sent:
            self.is_sent = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def send_json(self, status: int, body: Mapping[str, Any]) -> None:
        """Send a whole answer."""
        self.is_sent = True
        data = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, error: RequestError) -> None:
        """Send an error; in a stream that has begun, as its last event."""
        if self.is_sent:
            await self._send_event(json.dumps(error.to_body()))
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self.send_json(error.status, error.to_body())


def _read_engine_error(data: bytes) -> str:
    """Read the words of an engine's error."""
    try:
        body = json.loads(data)
        words = body.get("detail") or body.get("error")
        return f"the engine refuses the request: {words}"
    except (ValueError, AttributeError):
        return "the engine failed"
