"""Find what looks like a password, token or private key in text.

detect-secrets recognises most kinds; the patterns here are for those that it lacks. Plain hashes and commits are no secrets: its detectors
of high entropy are not used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from azrecipe.utils.environment_variables import ALLOW_SECRETS

MAX_SCANNED_BYTES = 4 * 2**20  # of each data file; half a second
PRAGMA = "pragma: allowlist secret"  # detect-secrets' own comment for a line that it must not report
WAY_OUT = f"if it is none, end the line with the comment '# {PRAGMA}', or set {ALLOW_SECRETS}=1"


class _Kind(NamedTuple):
    """A pattern for one kind of secret.

    One of `hints` is in every match.
    """

    name: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    in_prose: bool = True  # whether ordinary text hardly ever matches by accident


_KINDS = (
    _Kind("a Hugging Face token", ("hf_", "api_org_"), re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}")),
    _Kind("a GitHub token", ("github_pat_",), re.compile(r"(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{20,}")),
    _Kind("a GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), re.compile(r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{30,}")),
    _Kind("a GitLab token", ("glpat-",), re.compile(r"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_\-.]{20,}")),
    _Kind("a Slack token", ("xox", "xapp-"), re.compile(r"(?<![A-Za-z0-9])(?:xox[abeoprs]|xapp)-[A-Za-z0-9-]{10,}")),
    _Kind("a Google API key", ("AIza",), re.compile(r"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}")),
    _Kind(
        "an API key", ("sk-",), re.compile(r"(?<![A-Za-z0-9])sk-(?:(?:ant|proj|svcacct|admin|or|lf)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})")
    ),
    _Kind("a private key", ("PRIVATE KEY",), re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")),
    _Kind("an AWS access key", ("AKIA", "ASIA"), re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])")),
    _Kind("a Weights & Biases key", ("andb", "ANDB"), re.compile(r"(?i:wandb[a-z_ ]{0,20}key)\W{1,5}[0-9a-f]{40}(?![0-9a-f])")),
    _Kind(
        "a password in an address",
        ("://",),
        re.compile(r"://[^\s/:@'\"<>]*:(?=[^\s/@]*[0-9])(?![$<{*])[^\s/@'\"<>]+@[^\s/@]"),
    ),
    _Kind(
        "a password in an address",
        ("://",),
        re.compile(r"://[^\s/:@'\"<>]*:(?![$<{*])[^\s/@'\"<>]+@[^\s/@]"),
        in_prose=False,
    ),
    _Kind(
        "a password or key",
        (":", "="),
        re.compile(
            r"(?im)^[\s\-{'\"]*[\w.-]*(?:password|passwd|api_?key|hub_token|auth_token|access_token|client_secret|secret_key)['\"]?[ \t]*[:=][ \t]*"
            r"['\"]?(?![$<{*'\"\s]|(?:null|none|true|false)\b)[^\s'\"]{6,}"
        ),
        in_prose=False,
    ),
)
_AWS_SECRET_KEY = re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")
_AWS_WORDS = re.compile(r"(?i)aws|secret|access_?key")
_DETECTORS = (  # modules of detect_secrets.plugins; those that are left out take words of a language for keys
    "aws", "azure_storage_key", "discord", "github_token", "gitlab_token", "jwt", "mailchimp", "npm", "openai", "private_key", "pypi_token",
    "sendgrid", "slack", "square_oauth", "stripe", "telegram_token", "twilio",
)  # fmt: skip
# Every secret that these recognise holds such a run. detect-secrets, which takes half a second to load, sees only what is around one.
_LONG_RUN = re.compile(
    r"[A-Za-z0-9]{20}|[A-Za-z0-9_-]{24}(?=\.)|\d{8}:[A-Za-z0-9_-]{35}|PRIVATE KEY|PuTTY-User|_authToken|hooks\.slack", re.ASCII
)
_WINDOW = 120  # characters around such a run


@dataclass(frozen=True)
class SecretMatch:
    """What looks like a secret: its place, from 1, and its kind.

    Its text is not kept.
    """

    line: int
    column: int
    kind: str


@cache
def _load_detectors() -> tuple[tuple[str, Callable[[str], Any]], ...]:
    """Load detect-secrets' detectors: kinds and functions that yield secrets."""
    import importlib

    from detect_secrets.plugins.base import BasePlugin

    detectors = []
    for name in _DETECTORS:
        module = importlib.import_module(f"detect_secrets.plugins.{name}")
        for plugin in vars(module).values():
            if isinstance(plugin, type) and issubclass(plugin, BasePlugin) and plugin.__module__ == module.__name__:
                detectors.append((f"detect-secrets: {plugin.secret_type}", plugin().analyze_string))
    return tuple(detectors)


def _iterate_matches(text: str, prose: bool) -> Iterator[tuple[int, str]]:
    """Yield offset and kind of whatever looks like a secret, in no order."""
    for kind in _KINDS:
        if (kind.in_prose or not prose) and any(hint in text for hint in kind.hints):
            yield from ((match.start(), kind.name) for match in kind.pattern.finditer(text))
    for key in _AWS_SECRET_KEY.finditer(text):
        before = text[max(text.rfind("\n", 0, key.start()) + 1, key.start() - 60) : key.start()]
        if _AWS_WORDS.search(before) and all(re.search(characters, key[0]) for characters in ("[a-z]", "[A-Z]", "[0-9]")):
            yield key.start(), "an AWS secret key"
    end = 0
    for run in _LONG_RUN.finditer(text):
        if run.start() < end:
            continue
        start = max(text.rfind("\n", 0, run.start()) + 1, run.start() - _WINDOW)
        line_end = text.find("\n", run.end())
        end = min(line_end if line_end >= 0 else len(text), run.end() + _WINDOW)
        window = text[start:end]
        for name, analyze in _load_detectors():
            yield from ((start + max(window.find(secret), 0), name) for secret in analyze(window))


def find_secrets(text: str, prose: bool = False) -> list[SecretMatch]:
    """Find what looks like a secret, one a line.

    Lines with detect-secrets' comment are passed over. With AZRECIPE_ALLOW_SECRETS nothing is found. In `prose`, text that a model
    is trained on, a password is only found in an address, and with a digit: manuals speak of passwords.
    """
    if ALLOW_SECRETS.is_set:
        return []
    secrets: dict[int, SecretMatch] = {}
    for offset, kind in sorted(_iterate_matches(text, prose)):
        start = text.rfind("\n", 0, offset) + 1
        if start in secrets:
            continue
        line = text[start:].partition("\n")[0] if offset - start < MAX_SCANNED_BYTES else ""
        if PRAGMA not in line:
            secrets[start] = SecretMatch(text.count("\n", 0, offset) + 1, offset - start + 1, kind)
    return list(secrets.values())
