"""`azrecipe chat`: a conversation in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from azrecipe.errors import EXIT_SUCCESS, CommandError
from azrecipe.inference import streaming
from azrecipe.runs import finished_model
from azrecipe.utils.atomic_files import write_text
from azrecipe.utils.console import check_utf8, print_answer, print_line, print_progress

HELP_TEXT = """\
/reset         forget the conversation (the system message stays)
/system TEXT   another system message, and a new conversation; without TEXT: none
/save FILE     add the conversation to FILE, a line of JSON in the format `messages`, which `stage: sft` reads
/help          this
/exit          end (so does Ctrl-D). Ctrl-C stops an answer"""


def run_chat(arguments: argparse.Namespace) -> int:
    """Answer until the input ends; return the exit code.

    Answers go to stdout, all else to stderr.
    """
    check_utf8(arguments.system, "--system")
    model = finished_model.resolve_model(arguments.model)
    reader = streaming.open_reader(model)
    if not reader.has_chat_template:
        raise CommandError(
            f"{model.path} has no chat template: it continues text and does not answer. Use azrecipe generate --text. {streaming.NO_TEMPLATE}"
        )
    if arguments.system:
        reader.render(
            [{"role": "system", "content": arguments.system}, {"role": "user", "content": "?"}]
        )  # a template may refuse system messages
    session = ChatSession(reader.load_generator(arguments.precision), streaming.read_settings(arguments), arguments.seed)
    session.reset(arguments.system)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and a history
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    print_progress(f"{model.name}. /help lists the commands, Ctrl-D ends")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print_line()
            return EXIT_SUCCESS
        except KeyboardInterrupt:
            print_progress("\n/exit or Ctrl-D ends")
            continue
        if not line:
            continue
        if line == "/exit":
            return EXIT_SUCCESS
        if line.startswith("/"):
            _run_chat_command(session, *line[1:].split(maxsplit=1))
        else:
            session.ask(line)


class ChatSession:
    """The messages of a conversation, and the model that answers them."""

    def __init__(self, generator: streaming.StreamingGenerator, settings: streaming.GenerationSettings, seed: int) -> None:
        self.generator, self.settings, self.seed = generator, settings, seed
        self.system = ""
        self.turns: list[dict[str, str]] = []
        self.num_cut_short = 0  # answers that Ctrl-C or the length limit ended

    def reset(self, system: str) -> None:
        """Start a new conversation, with the first seed of sampling."""
        self.system, self.turns, self.num_cut_short = system, [], 0
        streaming.seed_sampling(self.seed)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation in the format `messages`."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def render(self) -> list[int]:
        """Render the conversation as ids, up to the assistant's turn."""
        return self.generator.reader.render(self.messages)

    def ask(self, text: str) -> None:
        """Answer a turn of the user.

        A turn that gets no answer is removed from the history.
        """
        old_turns = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fit_context()
        except CommandError as error:
            self.turns = old_turns
            print_progress(str(error))
            return
        answer = self.generator.generate(ids, self.settings, print_answer)
        print_line()
        if answer.stop_reason == "stopped":
            print_progress("[stopped]")
        elif answer.stop_reason == "length":
            print_progress(f"[cut off after {answer.num_tokens:,} tokens]")
        if answer.text.strip():
            self.turns.append({"role": "assistant", "content": answer.text})
            self.num_cut_short += answer.stop_reason != "end"
        else:
            self.turns.pop()
            print_progress("[no answer; your message is left out of the conversation]")

    def _fit_context(self) -> list[int]:
        """Render the prompt; drop the oldest turns until an answer fits.

        Raises CommandError where the last turn alone is too long.
        """
        context = self.generator.reader.context
        answer_tokens = min(self.settings.max_new_tokens, context // 4)
        ids, num_dropped = self.render(), 0
        while len(ids) + answer_tokens > context and len(self.turns) > 1:
            next_question = next((i for i, turn in enumerate(self.turns) if i and turn["role"] == "user"), len(self.turns) - 1)
            del self.turns[:next_question]
            num_dropped += next_question
            ids = self.render()
        if len(ids) >= context:
            raise CommandError(f"[your message has {len(ids):,} tokens and the model's context {context:,}: it was not sent]")
        if num_dropped:
            print_progress(f"[the conversation outgrew the model's {context:,} tokens: its oldest {num_dropped} messages are dropped]")
        return ids


def _run_chat_command(session: ChatSession, verb: str = "", argument: str = "") -> None:
    if verb == "reset":
        session.reset(session.system)
        print_progress("[forgotten]")
    elif verb == "system":
        session.reset(argument)
        print_progress("[a new conversation, with that system message]" if argument else "[a new conversation, with no system message]")
    elif verb == "save":
        print_progress(_save_conversation(session, argument))
    elif verb == "help":
        print_progress(HELP_TEXT)
    else:
        print_progress(f"there is no command /{verb}\n{HELP_TEXT}")


def _save_conversation(session: ChatSession, name: str) -> str:
    """Add the conversation to a file as one line; return a message.

    A file with other content is not changed.
    """
    if not name:
        return "/save FILE: name a file"
    if not any(turn["role"] == "assistant" for turn in session.turns):
        return "[nothing to save: there is no answer yet]"
    path = Path(name).expanduser().resolve()
    try:
        old_text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in old_text.split("\n") if line.strip()]
        if lines and "messages" not in json.loads(lines[-1]):
            return f"[{name} holds something other than conversations: not saved]"
        separator = "\n" if old_text and not old_text.endswith("\n") else ""
        write_text(path, f"{old_text}{separator}{json.dumps({'messages': session.messages}, ensure_ascii=False)}\n")
    except (ValueError, TypeError):
        return f"[{name} holds something other than conversations: not saved]"
    except OSError as error:
        return f"[{name} cannot be written: {error.strerror}]"
    note = f"; {session.num_cut_short} of its answers were cut short" if session.num_cut_short else ""
    return f"[saved to {name}, line {len(lines) + 1}{note}]"
