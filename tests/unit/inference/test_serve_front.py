"""The front of the server: what is refused, in OpenAI's form; and a real engine behind it where its packages are installed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from azrecipe.inference.serve_front import CheckedFront, FrontSettings, Message
from azrecipe.inference.serve_requests import CHAT, COMPLETION

MESSAGES = [{"role": "user", "content": "Salam"}]


class Engine:
    """An application that streams words as transformers serve does, until it is ended."""

    def __init__(self, words: int = 3, pause: float = 0.0) -> None:
        self.words, self.pause = words, pause
        self.requests: list[dict[str, Any]] = []
        self.num_ended = 0  # answers that were ended before their last word

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.requests.append({**body, "path": scope["path"]})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for n in range(self.words):
                await asyncio.sleep(self.pause)
                choice = {"delta": {"content": f"w{n} "}} if scope["path"] == CHAT else {"text": f"w{n} "}
                event = {"id": "x", "created": 1, "choices": [{"index": 0, **choice, "finish_reason": None}]}
                await send({"type": "http.response.body", "body": f"data: {json.dumps(event)}\n\n".encode(), "more_body": True})
        except asyncio.CancelledError:
            self.num_ended += 1
            raise
        last = {"choices": [{"index": 0, "finish_reason": "length"}], "usage": {"completion_tokens": self.words}}
        await send({"type": "http.response.body", "body": f"data: {json.dumps(last)}\n\n".encode(), "more_body": False})


def count_words(request: Mapping[str, Any]) -> int:
    text = request["prompt"] if "prompt" in request else " ".join(message["content"] for message in request["messages"])
    return len(text.split())


def build_front(engine: Engine, **settings: Any) -> CheckedFront:
    return CheckedFront(engine, FrontSettings("./model", ("model", "./model"), context=64, **settings), count_words)


async def send_request(
    front: CheckedFront, method: str, path: str, body: Any = None, *, leave_after: float | None = None, **headers: str
) -> tuple[int, str]:
    """Send a request in this process; the client leaves after so many seconds."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    names = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    requests, sent = [{"type": "http.request", "body": data, "more_body": False}], []

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.sleep(leave_after if leave_after is not None else 1_000)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(k.encode(), v.encode()) for k, v in names.items()]}
    await front(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return (sent[0]["status"] if sent else 0), text


def ask(front: CheckedFront, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
    status, text = asyncio.run(send_request(front, method, path, body, **options))
    return status, json.loads(text) if text.startswith("{") else text


ILL = [
    ({"messages": None}, "messages"), ({"messages": "Salam"}, "messages"), ({"messages": []}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": ["Salam"]}, "messages[0]"), ({"messages": [None]}, "messages[0]"), ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": 1, "content": "a"}]}, "messages[0].role"), ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"), ({"messages": MESSAGES, "max_tokens": "9"}, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"), ({"messages": MESSAGES, "max_tokens": -1}, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": 1.5}, "max_tokens"), ({"messages": MESSAGES, "max_tokens": True}, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": 10**400}, "max_tokens"), ({"messages": MESSAGES, "temperature": "hot"}, "temperature"),
    ({"messages": MESSAGES, "temperature": -1}, "temperature"), ({"messages": MESSAGES, "top_p": 0}, "top_p"), ({"messages": MESSAGES, "n": 2}, "n"),
    ({"messages": MESSAGES, "stream": "yes"}, "stream"), ({"messages": MESSAGES, "stop": 3}, "stop"), ({"messages": MESSAGES, "stop": [""]}, "stop"),
    ({"messages": MESSAGES, "stop": ["a"] * 5}, "stop"), ({"messages": MESSAGES, "seed": 2**70}, "seed"),
    ({"messages": MESSAGES, "frequency_penalty": -1}, "frequency_penalty"),
    ({"messages": MESSAGES, "generation_config": "{}"}, "generation_config"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"), ({"messages": MESSAGES, "tools": []}, "tools"),
    ({"messages": MESSAGES, "model": "another"}, "model"), ({"messages": MESSAGES, "model": 3}, "model"), ({"prompt": "a"}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "parameter"), ILL)
def test_an_ill_typed_request_is_refused_before_the_engine_sees_it(body: dict[str, Any], parameter: str) -> None:
    engine = Engine()
    status, answer = ask(build_front(engine), "POST", CHAT, body)
    assert status == (404 if parameter == "model" else 400) and answer["error"]["param"] == parameter, answer
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"] and not engine.requests


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b'"a"', 400), (b"\xff\xfe", 400), (b'{"messages": NaN}', 400), (b"[" * 100_000, 400),
        (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413), (b'{"prompt": ["a", "b"]}', 400), (b'{"prompt": [1, 2]}', 400), (b'{"prompt": ""}', 400),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(data: bytes, status: int) -> None:
    found, answer = ask(build_front(Engine()), "POST", COMPLETION, data)
    assert found == status and answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/load_model", 404), ("POST", "/reset", 404), ("POST", "/v1/responses", 404), ("POST", "/v1/systemone", 404), ("GET", "/docs", 404),
        ("POST", "/v1/audio/transcriptions", 404), ("GET", "/openapi.json", 404), ("GET", CHAT, 405), ("OPTIONS", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
    ],
)  # fmt: skip
def test_nothing_else_is_reachable(method: str, path: str, status: int) -> None:
    engine = Engine()
    assert ask(build_front(engine), method, path, {"model": "/etc"})[0] == status and not engine.requests


def test_models_are_listed_by_the_served_name() -> None:
    assert [model["id"] for model in ask(build_front(Engine()), "GET", "/v1/models")[1]["data"]] == ["model"]
    assert ask(build_front(Engine()), "GET", "/v1/models/model")[1]["id"] == "model"
    assert ask(build_front(Engine()), "GET", "/health") == (200, {"status": "ok"})


def test_the_context_limits_prompt_and_answer() -> None:
    engine = Engine()
    front = build_front(engine)
    status, answer = ask(front, "POST", COMPLETION, {"prompt": "a " * 64})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded" and "64 tokens" in answer["error"]["message"]
    assert ask(front, "POST", COMPLETION, {"prompt": "a " * 60, "max_tokens": 10**9})[0] == 200
    assert ask(front, "POST", CHAT, {"messages": MESSAGES, "max_completion_tokens": 5, "user": "u", "model": "./model"})[0] == 200
    assert ask(front, "POST", CHAT, {"messages": MESSAGES})[0] == 200
    assert [request["max_tokens"] for request in engine.requests] == [4, 5, 63]
    assert all(request["model"] == "./model" and "user" not in request for request in engine.requests)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_an_answer_comes_whole_or_as_a_stream(path: str) -> None:
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "Salam"}
    status, answer = ask(build_front(Engine()), "POST", path, body)
    choice = answer["choices"][0]
    assert status == 200 and (choice["message"]["content"] if path == CHAT else choice["text"]) == "w0 w1 w2 "
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3 and answer["model"] == "model"
    status, text = ask(build_front(Engine()), "POST", path, {**body, "stream": True})
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]" and len(events) == 5 and json.loads(events[0])["model"] == "model"


def test_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    front = build_front(Engine(), api_key="ağac")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "ağac"}, {"authorization": "Bearer ağa"}):
        status, answer = ask(front, "GET", "/v1/models", **headers)
        assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert ask(build_front(Engine(), api_key="key"), "GET", "/v1/models", authorization="Bearer key")[0] == 200
    assert ask(front, "GET", "/health")[0] == 200


def test_a_form_of_a_web_page_is_refused() -> None:
    engine = Engine()
    assert ask(build_front(engine), "POST", CHAT, {"messages": MESSAGES}, content_type="text/plain")[0] == 415 and not engine.requests


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_limited_and_generation_ends(stream: bool) -> None:
    engine = Engine(words=10**6, pause=0.01)
    status, text = asyncio.run(send_request(build_front(engine, timeout=0.2), "POST", CHAT, {"messages": MESSAGES, "stream": stream}))
    assert engine.num_ended == 1 and "no answer within 0.2 seconds" in text and status == (200 if stream else 504)


def test_generation_ends_when_the_client_has_gone() -> None:
    engine = Engine(words=10**6, pause=0.01)
    asyncio.run(send_request(build_front(engine), "POST", CHAT, {"messages": MESSAGES}, leave_after=0.1))
    assert engine.num_ended == 1


def test_many_at_a_time_are_all_answered() -> None:
    async def ask_all() -> list[tuple[int, str]]:
        front = build_front(Engine(pause=0.001))
        return await asyncio.gather(*(send_request(front, "POST", CHAT, {"messages": MESSAGES}) for _ in range(160)))

    assert [status for status, _ in asyncio.run(ask_all())] == [200] * 160


def test_an_engine_that_fails_is_told_in_openais_form() -> None:
    async def broken(scope: Message, receive: Any, send: Any) -> None:
        raise ValueError("secret detail")

    async def refusing(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 422, "headers": []})
        await send({"type": "http.response.body", "body": b'{"detail": "no"}', "more_body": False})

    for engine, expected, words in ((broken, 500, "ValueError"), (refusing, 400, "refuses the request: no")):
        status, answer = ask(CheckedFront(engine, FrontSettings("m", ("m",), 64), count_words), "POST", CHAT, {"messages": MESSAGES})
        assert status == expected and words in answer["error"]["message"] and "secret" not in answer["error"]["message"]
