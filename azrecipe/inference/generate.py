"""`azrecipe generate`: what a model answers, or how it goes on, for prompts that are known beforehand."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from azrecipe.errors import DONE, SIGINT, CommandError
from azrecipe.inference import streaming
from azrecipe.runs import finished_model
from azrecipe.utils.console import check_text, say, show


def run(arguments: argparse.Namespace) -> int:
    """Write an answer to each prompt, on stdout; returns the exit code. All prompts are looked at before the first is answered."""
    prompts = _prompts(arguments.prompt, arguments.file)
    model = finished_model.find(arguments.model)
    reader = streaming.reader(model)
    chat = reader.chats if arguments.chat is None else arguments.chat
    if chat and not reader.chats:
        raise CommandError(f"{model.path} has no chat template, so it can only continue text: --text. {streaming.NO_TEMPLATE}")
    rendered = [reader.rendered([{"role": "user", "content": prompt}]) if chat else reader.continued(prompt) for prompt in prompts]
    _check_lengths(prompts, rendered, reader.context)
    writer = reader.writer(arguments.precision)
    settings = streaming.settings(arguments)
    for nth, (prompt, ids) in enumerate(zip(prompts, rendered, strict=True)):
        if reader.context - len(ids) < settings.max_new_tokens:
            say(f"the prompt takes {len(ids):,} of the model's {reader.context:,} tokens: at most {reader.context - len(ids):,} new ones")
        if len(prompts) > 1 and not arguments.json:
            print(f"{'' if nth == 0 else chr(10)}> {prompt}", flush=True)
        streaming.seed(arguments.seed)
        answer = writer.write(ids, settings, _nothing if arguments.json else show)
        if arguments.json:
            line = {"prompt": prompt, "form": "chat" if chat else "text", "output": answer.text, "tokens": answer.tokens,
                    "ended": answer.why == "end"}  # fmt: skip
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        if answer.why == "stopped":
            return SIGINT
    return DONE


def _nothing(_piece: str) -> None:
    pass


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Those of the command line, then those of the file, one a line. Raises CommandError where there is none, or one is no text."""
    found = list(given)
    if file is not None:
        try:
            text = sys.stdin.buffer.read().decode() if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(f"--file {file} is not UTF-8: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise CommandError(f"--file {file} cannot be read: {error.strerror}") from None
        found += [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    for prompt in found:
        if not prompt.strip():
            raise CommandError("--prompt is empty")
        check_text(prompt, "--prompt")
    if not found:
        raise CommandError(
            f"--file {file} holds no prompt" if file is not None else "no prompt: give --prompt TEXT or --file FILE (one a line)"
        )
    return found


def _check_lengths(prompts: Sequence[str], rendered: Sequence[Sequence[int]], context: int) -> None:
    long = [(p, len(ids)) for p, ids in zip(prompts, rendered, strict=True) if len(ids) >= context]
    if long:
        lines = [f"the prompt that begins with '{' '.join(p.split())[:40]}' has {count:,} tokens" for p, count in long]
        raise CommandError("\n".join([*lines, f"The model's context is {context:,} tokens, answer included"]))
