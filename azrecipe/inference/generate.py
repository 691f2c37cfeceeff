"""`azrecipe generate`: answer prompts, or continue text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from azrecipe.errors import EXIT_SIGINT, EXIT_SUCCESS, CommandError
from azrecipe.inference import streaming
from azrecipe.runs import finished_model
from azrecipe.utils.console import check_utf8, print_answer, print_line, print_progress


def run_generate(arguments: argparse.Namespace) -> int:
    """Print an answer to each prompt; return the exit code.

    All prompts are checked before the first is answered.
    """
    prompts = _read_prompts(arguments.prompt, arguments.file)
    model = finished_model.resolve_model(arguments.model)
    reader = streaming.open_reader(model)
    chat = reader.has_chat_template if arguments.chat is None else arguments.chat
    if chat and not reader.has_chat_template:
        raise CommandError(f"{model.path} has no chat template, so it can only continue text: --text. {streaming.NO_TEMPLATE}")
    rendered = [reader.render([{"role": "user", "content": prompt}]) if chat else reader.encode_continuation(prompt) for prompt in prompts]
    _check_lengths(prompts, rendered, reader.context)
    generator = reader.load_generator(arguments.precision)
    settings = streaming.read_settings(arguments)
    for i, (prompt, ids) in enumerate(zip(prompts, rendered, strict=True)):
        if (num_free := reader.context - len(ids)) < settings.max_new_tokens:
            print_progress(f"the prompt takes {len(ids):,} of the model's {reader.context:,} tokens: at most {num_free:,} new ones")
        if len(prompts) > 1 and not arguments.json:
            print_line(f"{chr(10) if i else ''}> {prompt}")
        streaming.seed_sampling(arguments.seed)
        answer = generator.generate(ids, settings, _ignore_text if arguments.json else print_answer)
        if arguments.json:
            line = {"prompt": prompt, "form": "chat" if chat else "text", "output": answer.text, "tokens": answer.num_tokens,
                    "ended": answer.stop_reason == "end"}  # fmt: skip
            print_line(json.dumps(line, ensure_ascii=False))
        else:
            print_line()
        if answer.stop_reason == "stopped":
            return EXIT_SIGINT
    return EXIT_SUCCESS


def _ignore_text(_piece: str) -> None:
    pass


def _read_prompts(options: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line, then those of the file.

    The file has one a line. Raises CommandError where there is none, or one is empty or not UTF-8.
    """
    prompts = list(options)
    if file is not None:
        try:
            text = sys.stdin.buffer.read().decode() if str(file) == "-" else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CommandError(f"--file {file} is not UTF-8: {error.reason} at byte {error.start}") from None
        except OSError as error:
            raise CommandError(f"--file {file} cannot be read: {error.strerror}") from None
        prompts += [line.strip() for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    for prompt in prompts:
        if not prompt.strip():
            raise CommandError("--prompt is empty")
        check_utf8(prompt, "--prompt")
    if not prompts:
        raise CommandError(
            f"--file {file} holds no prompt" if file is not None else "no prompt: give --prompt TEXT or --file FILE (one a line)"
        )
    return prompts


def _check_lengths(prompts: Sequence[str], rendered: Sequence[Sequence[int]], context: int) -> None:
    lines = [
        f"the prompt that begins with '{' '.join(prompt.split())[:40]}' has {len(ids):,} tokens"
        for prompt, ids in zip(prompts, rendered, strict=True)
        if len(ids) >= context
    ]
    if lines:
        raise CommandError("\n".join([*lines, f"The model's context is {context:,} tokens, answer included"]))
