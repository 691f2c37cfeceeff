"""The server's process: an engine behind the checked front."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from azrecipe.inference.serve_front import Application, CheckedFront, FrontSettings, Message, Receive, Send, TokenCounter
from azrecipe.inference.serve_requests import RequestError
from azrecipe.utils.environment_variables import API_KEY, SERVE_SETTINGS
from azrecipe.utils.template_limits import limit_chat_templates

NO_LIMIT = 10**9  # tokens, for a model without a stated context


def read_settings() -> tuple[FrontSettings, str]:
    """Read the settings that `azrecipe serve` has put into the environment.

    Returns:
        The settings, and the tokenizer's path.
    """
    from transformers import AutoConfig

    data = json.loads(SERVE_SETTINGS.read())
    path = str(data.pop("path"))
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    context = int(getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    return FrontSettings(**{**data, "names": tuple(data["names"])}, context=context, api_key=API_KEY.read()), path


def build_token_counter(path: str) -> TokenCounter:
    """Build a counter of a request's prompt tokens."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    limit_chat_templates()
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    def count_tokens(request: Mapping[str, Any]) -> int:
        if "prompt" in request:
            return len(tokenizer(request["prompt"])["input_ids"])
        if tokenizer.chat_template is None:
            raise RequestError(400, "this model has no chat template: it continues text at /v1/completions", "messages")
        try:
            encoded = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise RequestError(400, f"the chat template refuses the conversation: {error}", "messages") from None
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise RequestError(400, f"the chat template fails on the conversation: {error}", "messages") from None
        return len(encoded["input_ids"])

    return count_tokens


class FrontMiddleware:
    """The front as a middleware of vLLM (--middleware)."""

    def __init__(self, app: Application) -> None:
        settings, path = read_settings()
        self.front = CheckedFront(app, settings, build_token_counter(path))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        await self.front(scope, receive, send)


def serve_with_transformers(arguments: Sequence[str]) -> None:
    """Run transformers serve behind the front until a signal ends it.

    `arguments` are host and port.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    settings, path = read_settings()
    count_tokens = build_token_counter(path)
    build_server = server.build_server

    def build_checked_server(*parts: Any, **options: Any) -> CheckedFront:
        return CheckedFront(build_server(*parts, **options), settings, count_tokens)

    server.build_server = build_checked_server
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
        Serve(force_model=settings.engine_name, host=arguments[0], port=int(arguments[1]), enable_cors=False)


if __name__ == "__main__":
    serve_with_transformers(sys.argv[1:])
