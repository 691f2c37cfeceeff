"""`azrecipe chat`: a conversation in a terminal, or through a pipe. Knows its history, its commands, and what fits the context."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from azrecipe.errors import DONE, CommandError
from azrecipe.inference import streaming
from azrecipe.runs import finished_model
from azrecipe.utils.atomic_files import write_text
from azrecipe.utils.console import check_text, say, show

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   another system message, and a new conversation; without TEXT: none
/save FILE     add the conversation to FILE, a line of JSON in the format `messages`, which `stage: sft` reads
/help          this
/exit          end (so does Ctrl-D). Ctrl-C stops an answer"""


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends; returns the exit code. Answers go to stdout, all else to stderr."""
    check_text(arguments.system, "--system")
    model = finished_model.find(arguments.model)
    reader = streaming.reader(model)
    if not reader.chats:
        raise CommandError(
            f"{model.path} has no chat template: it continues text and does not answer. Use azrecipe generate --text. {streaming.NO_TEMPLATE}"
        )
    if arguments.system:
        reader.rendered([{"role": "system", "content": arguments.system}, {"role": "user", "content": "?"}])  # a template may refuse it
    talk = Conversation(reader.writer(arguments.precision), streaming.settings(arguments), arguments.seed)
    talk.begin(arguments.system)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines and knows the earlier ones with it
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    say(f"{model.name}. /help lists the commands, Ctrl-D ends")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return DONE
        except KeyboardInterrupt:
            say("\n/exit or Ctrl-D ends")
            continue
        if not line:
            continue
        if line == "/exit":
            return DONE
        if line.startswith("/"):
            _command(talk, *line[1:].split(maxsplit=1))
        else:
            talk.ask(line)


class Conversation:
    """The messages so far and the model that answers them."""

    def __init__(self, writer: streaming.Writer, settings: streaming.Settings, seed: int) -> None:
        self.writer, self.settings, self.seed = writer, settings, seed
        self.system = ""
        self.turns: list[dict[str, str]] = []
        self.unfinished = 0  # answers that Ctrl-C or the length cut short

    def begin(self, system: str) -> None:
        """A conversation without turns, the random numbers of sampling included."""
        self.system, self.turns, self.unfinished = system, [], 0
        streaming.seed(self.seed)

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, in the format `messages`."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def rendered(self) -> list[int]:
        """The whole as ids, up to where the assistant begins to speak."""
        return self.writer.reader.rendered(self.messages)

    def ask(self, text: str) -> None:
        """A turn of the user, and the answer to it; what cannot be answered leaves no trace in the history."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fitted()
        except CommandError as error:
            self.turns = before
            say(str(error))
            return
        answer = self.writer.write(ids, self.settings, show)
        print(flush=True)
        if answer.why == "stopped":
            say("[stopped]")
        elif answer.why == "length":
            say(f"[cut off after {answer.tokens:,} tokens]")
        if answer.text.strip():
            self.turns.append({"role": "assistant", "content": answer.text})
            self.unfinished += answer.why != "end"
        else:
            self.turns.pop()
            say("[no answer; your message is left out of the conversation]")

    def _fitted(self) -> list[int]:
        """The prompt, the oldest turns dropped as far as an answer needs the room. Raises CommandError where the last alone is too long."""
        context = self.writer.reader.context
        room = min(self.settings.max_new_tokens, context // 4)
        ids, dropped = self.rendered(), 0
        while len(ids) + room > context and len(self.turns) > 1:
            second = next((i for i, turn in enumerate(self.turns) if i and turn["role"] == "user"), len(self.turns) - 1)
            del self.turns[:second]
            dropped += second
            ids = self.rendered()
        if len(ids) >= context:
            raise CommandError(f"[your message has {len(ids):,} tokens and the model's context {context:,}: it was not sent]")
        if dropped:
            say(f"[the conversation outgrew the model's {context:,} tokens: its oldest {dropped} messages are dropped]")
        return ids


def _command(talk: Conversation, verb: str = "", rest: str = "") -> None:
    if verb == "reset":
        talk.begin(talk.system)
        say("[forgotten]")
    elif verb == "system":
        talk.begin(rest)
        say("[a new conversation, with that system message]" if rest else "[a new conversation, with no system message]")
    elif verb == "save":
        say(_saved(talk, rest))
    elif verb == "help":
        say(HELP)
    else:
        say(f"there is no command /{verb}\n{HELP}")


def _saved(talk: Conversation, name: str) -> str:
    """Add the conversation to a file as one line; returns what there is to say. A file that holds something else is left alone."""
    if not name:
        return "/save FILE: say which"
    if not any(turn["role"] == "assistant" for turn in talk.turns):
        return "[nothing to save: there is no answer yet]"
    path = Path(name).expanduser().resolve()
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in before.split("\n") if line.strip()]
        if lines and "messages" not in json.loads(lines[-1]):
            return f"[{name} holds something other than conversations: not saved]"
        write_text(
            path,
            before
            + ("\n" if before and not before.endswith("\n") else "")
            + json.dumps({"messages": talk.messages}, ensure_ascii=False)
            + "\n",
        )
    except (ValueError, TypeError):
        return f"[{name} holds something other than conversations: not saved]"
    except OSError as error:
        return f"[{name} cannot be written: {error.strerror}]"
    cut = f"; {talk.unfinished} of its answers were cut short" if talk.unfinished else ""
    return f"[saved to {name}, line {len(lines) + 1}{cut}]"
