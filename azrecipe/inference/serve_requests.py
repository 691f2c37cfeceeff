"""Check requests to the server's OpenAI-compatible endpoints before the engine sees them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
DEFAULT_MAX_TOKENS = 1_024
MAX_STOPS = 4
ROLES = ("system", "developer", "user", "assistant")
IGNORED_KEYS = {"user", "metadata", "store", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key", "echo", "best_of"}


class RequestError(Exception):
    """A request is refused; the answer has OpenAI's form."""

    def __init__(self, status: int, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code

    def to_body(self) -> dict[str, Any]:
        """Return the answer's body."""
        kind = "server_error" if self.status >= 500 else "authentication_error" if self.status == 401 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


def parse_body(data: bytes) -> dict[str, Any]:
    """Parse a request's JSON object. Raises RequestError."""
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(body, dict):
        raise RequestError(400, f"the body must be a JSON object, not {_name_type(body)}")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(400, f"the body is no JSON: {name} is no number")


def _name_type(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def check_request(body: Mapping[str, Any], endpoint: str) -> dict[str, Any]:
    """Check a request, and return what the engine needs of it.

    Raises RequestError with the first problem.
    """
    readers = _CHAT_READERS if endpoint == CHAT else _COMPLETION_READERS
    for key in body:
        if key not in readers and key not in IGNORED_KEYS and key != "model":
            raise RequestError(400, f"'{key}' is not supported. Supported: {', '.join(sorted(readers))}", key)
    required = "messages" if endpoint == CHAT else "prompt"
    if body.get(required) is None:
        raise RequestError(400, f"'{required}' is missing", required)
    return {key: reader(key, body[key]) for key, reader in readers.items() if body.get(key) is not None}


def _read_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(400, f"'{key}' must be a string, not {_name_type(value)}", key)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(400, f"'{key}' holds half of a surrogate pair, which is no character", key) from None
    return value


def _read_messages(key: str, value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RequestError(400, f"'{key}' must be a list of at least one message", key)
    return [_read_message(f"{key}[{i}]", message) for i, message in enumerate(value)]


def _read_message(key: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(400, f"'{key}' must be an object with role and content, not {_name_type(message)}", key)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(400, f"'{key}.role' must be one of {', '.join(ROLES)}", f"{key}.role")
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise RequestError(
                    400, f"'{key}.content[{i}]' must be an object of type text: this model reads text only", f"{key}.content"
                )
        content = "".join(_read_text(f"{key}.content[{i}].text", part.get("text")) for i, part in enumerate(content))
    return {"role": "system" if role == "developer" else role, "content": _read_text(f"{key}.content", content)}


def _read_number(low: float, high: float, whole: bool = False) -> Callable[[str, object], float]:
    kind = "a whole number" if whole else "a number"

    def read(key: str, value: object) -> float:
        is_number = isinstance(value, int) or (isinstance(value, float) and not whole and math.isfinite(value))
        if isinstance(value, bool) or not is_number or not low <= value <= high:  # type: ignore[operator]
            raise RequestError(400, f"'{key}' must be {kind} from {low:g} to {high:g}", key)
        return value  # type: ignore[return-value]

    return read


def _read_flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(400, f"'{key}' must be true or false, not {_name_type(value)}", key)
    return value


def _read_stops(key: str, value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError(400, f"'{key}' must be a string that is not empty, or a list of at most {MAX_STOPS}", key)
    return [_read_text(key, stop) for stop in stops]


_READERS: Mapping[str, Callable[[str, object], Any]] = {
    "max_tokens": _read_number(1, 10**12, whole=True),
    "temperature": _read_number(0, 5),
    "top_p": _read_number(1e-6, 1),
    "frequency_penalty": _read_number(-0.9, 2),
    "seed": _read_number(0, 2**63 - 1, whole=True),
    "stop": _read_stops,
    "stream": _read_flag,
    "n": _read_number(1, 1, whole=True),
}
_CHAT_READERS = {**_READERS, "messages": _read_messages, "max_completion_tokens": _READERS["max_tokens"]}
_COMPLETION_READERS = {**_READERS, "prompt": _read_text}


def fit_context(request: dict[str, Any], prompt_tokens: int, context: int) -> dict[str, Any]:
    """Limit max_tokens to what the prompt leaves of the context.

    Raises RequestError where it leaves nothing.
    """
    if prompt_tokens == 0:
        raise RequestError(
            400, "the prompt is empty: the tokenizer makes no token of it", "messages" if "messages" in request else "prompt"
        )
    if prompt_tokens >= context:
        message = f"the prompt has {prompt_tokens} tokens, and the model's context is {context} tokens, answer included"
        raise RequestError(400, message, "messages" if "messages" in request else "prompt", "context_length_exceeded")
    max_tokens = request.pop("max_completion_tokens", None) or request.get("max_tokens") or DEFAULT_MAX_TOKENS
    request.pop("n", None)
    return {**request, "max_tokens": min(int(max_tokens), context - prompt_tokens)}


def join_chunks(events: Sequence[Mapping[str, Any]], endpoint: str, model: str) -> dict[str, Any]:
    """Join the events of a stream into one answer.

    Args:
        events: The chunks in order.
        endpoint: CHAT or COMPLETION.
        model: The model's name in the answer.
    """
    text, finish_reason, usage, first = "", None, None, events[0] if events else {}
    for event in events:
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or "" if endpoint == CHAT else choice.get("text") or ""
            finish_reason = choice.get("finish_reason") or finish_reason
    answer = {"message": {"role": "assistant", "content": text}} if endpoint == CHAT else {"text": text}
    return {
        "id": first.get("id", ""),
        "object": "chat.completion" if endpoint == CHAT else "text_completion",
        "created": first.get("created", 0),
        "model": model,
        "choices": [{"index": 0, **answer, "logprobs": None, "finish_reason": finish_reason or "stop"}],
        "usage": usage,
    }
