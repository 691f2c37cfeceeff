"""Find what looks like a password, token or private key in text.

detect-secrets finds it, with detectors of azrecipe's own. Plain hashes and commits are no secrets: its detectors of high entropy are
not used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from azrecipe.utils.environment_variables import ALLOW_SECRETS

PRAGMA = "pragma: allowlist secret"  # detect-secrets' own comment for a line that it must not report
WAY_OUT = f"if it is none, end the line with the comment '# {PRAGMA}', or set {ALLOW_SECRETS}=1"
_BEFORE, _AFTER = 200, 1000  # characters around a hint that a detector looks at
_MAX_TOKEN = 8000  # a token that goes on behind them is looked at up to this length

# What is in every secret that a detector finds: texts, or a pattern. detect-secrets takes half a second to load and its detectors are
# slow, so they see only what is around a hint.
_DETECT_SECRETS: Mapping[str, tuple[str, ...] | re.Pattern[str]] = {
    "azure_storage_key": ("AccountKey=",),
    "discord": re.compile(r"\.[A-Za-z\d_-]{6}\.[A-Za-z\d_-]{27}"),
    "jwt": ("eyJ",),
    "mailchimp": re.compile(r"-us\d"),
    "openai": ("T3BlbkFJ",),
    "pypi_token": ("pypi-AgE",),
    "sendgrid": ("SG.",),
    "square_oauth": ("sq0csp-",),
    "stripe": ("k_live_",),
    "telegram_token": re.compile(r"\d{8}:[0-9A-Za-z_-]{35}"),
}
_OWN: Mapping[str, tuple[str, ...] | re.Pattern[str]] = {
    "HubTokenDetector": ("hf_", "api_org_"),
    "FineGrainedGithubDetector": ("github_pat_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "GitlabTokenDetector": ("glpat-", "glptt-", "gldt-", "glrt-", "glcbt-", "glft-", "glimt-", "glagent-", "glsoat-"),
    "SlackTokenDetector": ("xox", "xapp-", "hooks.slack"),
    "WebhookDetector": ("/webhooks/", "/webhookb2/"),
    "GoogleKeyDetector": ("AIza", "GOCSPX-", "ya29."),
    "ModelServiceKeyDetector": ("sk-", "gsk_", "nvapi-", "r8_", "pplx-", "xai-", "fw_", "tgp_v1_"),
    "HostingTokenDetector": ("_v1_", "hvs.", "hvb.", "hvr.", "shpat_", "shpca_", "shppa_", "shpss_", "dapi"),
    "NpmTokenDetector": ("npm_", "_authToken"),
    "PrivateKeyDetector": ("PRIVATE KEY", "AGE-SECRET-KEY-", "PuTTY-User"),
    "AwsAccessKeyDetector": ("AKIA", "ASIA"),
    "AwsSecretKeyDetector": re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"),
    "SignedAddressDetector": ("sig=", "-Signature="),
    "WandbKeyDetector": ("andb", "ANDB"),
    "TwilioKeyDetector": ("wilio", "WILIO"),
    "AuthorizationDetector": ("uthorization", "UTHORIZATION", "earer ", "EARER "),
    "KaggleKeyDetector": ('"key"',),
    "NetrcDetector": ("machine ",),
    "AddressPasswordDetector": ("://",),
    "ProseAddressPasswordDetector": ("://",),
    "NamedValueDetector": re.compile(
        r"(?i)(?:pass(?:word|wd|phrase)|pwd|token|secret|key)['\"]?[ \t]{0,9}[:=]|--[a-z-]{0,40}(?:token|key) "
    ),
}
_NOT_IN_PROSE = {"AddressPasswordDetector", "NamedValueDetector"}  # manuals speak of passwords
_PROSE_ONLY = {"ProseAddressPasswordDetector"}


@dataclass(frozen=True)
class SecretMatch:
    """What looks like a secret: its place, from 1, and its kind.

    Its text is not kept.
    """

    line: int
    column: int
    kind: str


@cache
def _load_detector(name: str) -> tuple[str, Callable[[str], Any]]:
    """Load a detector: its kind, and a function that yields secrets."""
    import importlib

    from detect_secrets.plugins.base import BasePlugin

    if name in _OWN:
        from azrecipe.utils import secret_detectors

        detector = getattr(secret_detectors, name)()
        return detector.secret_type, detector.analyze_string
    module = importlib.import_module(f"detect_secrets.plugins.{name}")
    (plugin,) = (
        plugin
        for plugin in vars(module).values()
        if isinstance(plugin, type) and issubclass(plugin, BasePlugin) and plugin.__module__ == module.__name__
    )
    return f"detect-secrets: {plugin.secret_type}", plugin().analyze_string


def _iterate_windows(text: str, hints: tuple[str, ...] | re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield start and end of the text around each hint."""
    for hint in hints if isinstance(hints, tuple) else (hints,):
        position = 0
        while True:
            if isinstance(hint, str):
                anchor = text.find(hint, position)
            else:
                anchor = match.start() if (match := hint.search(text, position)) else -1
            if anchor < 0:
                break
            end = min(anchor + _AFTER, len(text))
            limit = min(end + _MAX_TOKEN, len(text))
            while end < limit and not text[end].isspace():
                end += 1
            yield max(anchor - _BEFORE, 0), end
            position = max(anchor + 1, end - _BEFORE)


def _iterate_matches(text: str, prose: bool) -> Iterator[tuple[int, str]]:
    """Yield offset and kind of whatever looks like a secret, in no order."""
    for name, hints in {**_OWN, **_DETECT_SECRETS}.items():
        if name in (_NOT_IN_PROSE if prose else _PROSE_ONLY):
            continue
        for start, end in _iterate_windows(text, hints):
            kind, analyze = _load_detector(name)
            window = text[start:end]
            yield from ((start + max(window.find(secret), 0), kind) for secret in analyze(window))


def find_secrets(text: str, prose: bool = False) -> list[SecretMatch]:
    """Find what looks like a secret, one a line.

    Lines with detect-secrets' comment are passed over. With AZRECIPE_ALLOW_SECRETS nothing is found. In `prose`, text that a model
    is trained on, a password is only found in an address, and with a digit: manuals speak of passwords.
    """
    if ALLOW_SECRETS.is_set:
        return []
    secrets: dict[int, SecretMatch | None] = {}
    line, counted = 1, 0
    for offset, kind in sorted(_iterate_matches(text, prose)):
        line, counted = line + text.count("\n", counted, offset), offset
        if line not in secrets:
            start, end = text.rfind("\n", 0, offset) + 1, text.find("\n", offset)
            is_allowed = PRAGMA in text[start : end if end >= 0 else len(text)]
            secrets[line] = None if is_allowed else SecretMatch(line, offset - start + 1, kind)
    return [secret for secret in secrets.values() if secret is not None]
