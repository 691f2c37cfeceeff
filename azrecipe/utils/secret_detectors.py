"""Detectors for detect-secrets: kinds that it lacks, or finds in ordinary text.

Import this only where a secret may be: detect-secrets takes half a second to load.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

from detect_secrets.plugins.base import RegexBasedDetector

_BEFORE = r"(?<![A-Za-z0-9])"
_PLACEHOLDER_WORDS = frozenset(
    ["a", "access", "add", "address", "api", "auth", "authorization", "basic", "bearer", "change", "changeme", "client", "code", "demo", "dummy", "empty", "enter", "example", "fake", "fill", "foo", "bar", "from", "fixme", "get", "goes", "good", "hf", "hidden", "host", "hub", "here", "id", "in", "insert", "is", "it", "key", "login", "masked", "me", "my", "name", "none", "null", "number", "of", "openai", "optional", "or", "pass", "passphrase", "password", "passwd", "placeholder", "private", "put", "pwd", "redacted", "replace", "required", "sample", "secret", "set", "some", "str", "string", "strong", "test", "text", "the", "this", "to", "todo", "token", "true", "false", "type", "undefined", "unknown", "user", "username", "value", "wandb", "your", "xxx", "xxxx"]
)  # fmt: skip
_CODE = re.compile(r"[A-Za-z_]+(?:\.[A-Za-z_]+)+|[A-Z]+(?:_[A-Z]+)+|.*[(\[].*|(?:\.{1,2}|~)/.*")


def is_placeholder(value: str) -> bool:
    """Whether a value stands for a secret: a word, a variable, dots."""
    if len(set(value)) < 4 or re.search(r"(.)\1{9}", value) or value[0] in "$<{*[%&!" or _CODE.fullmatch(value):
        return True
    return not re.search(r"\d", value) and all(word in _PLACEHOLDER_WORDS for word in re.split(r"[^a-z]+", value.lower()) if word)


def is_random(value: str) -> bool:
    """Whether a value mixes letters with digits, or capitals with small letters."""
    return bool(re.search(r"[A-Za-z]", value) and re.search(r"[0-9]|[a-z][A-Z]+[a-z]+[A-Z]", value))


class _TokenDetector(RegexBasedDetector):
    """Finds tokens by their form, unless few characters differ."""

    needs_digit = False  # where words could have the form, too

    def analyze_string(self, string: str, **_: Any) -> Generator[str, None, None]:
        for token in super().analyze_string(string):
            if len(set(token)) >= 9 and (not self.needs_digit or is_random(re.split("[-_.]", token, maxsplit=1)[-1])):
                yield token


class _ValueDetector(RegexBasedDetector):
    """Finds values by what is before them, unless they stand for another."""

    def analyze_string(self, string: str, **_: Any) -> Generator[str, None, None]:
        yield from (value for value in super().analyze_string(string) if not is_placeholder(value))


class HubTokenDetector(_TokenDetector):
    secret_type = "a Hugging Face token"
    denylist = (re.compile(_BEFORE + r"(?:hf|api_org)_[A-Za-z0-9]{30,}"),)


class FineGrainedGithubDetector(_TokenDetector):
    secret_type = "a GitHub token"
    denylist = (re.compile(_BEFORE + r"github_pat_[A-Za-z0-9_]{20,}"), re.compile(_BEFORE + r"gh[pousr]_[A-Za-z0-9]{30,}"))


class GitlabTokenDetector(_TokenDetector):
    secret_type = "a GitLab token"
    denylist = (re.compile(_BEFORE + r"gl(?:pat|ptt|dt|rt|cbt|ft|imt|agent|soat)-[A-Za-z0-9_.-]{20,}"),)
    needs_digit = True


class SlackTokenDetector(_TokenDetector):
    secret_type = "a Slack token"
    denylist = (
        re.compile(_BEFORE + r"xox[abeoprs](?:\.xox[bp])?-(?:\d+-)+[A-Za-z0-9-]{6,}"),
        re.compile(_BEFORE + r"xapp-\d-[A-Z0-9]+-\d+-[A-Za-z0-9]{10,}"),
        re.compile(r"hooks\.slack\.com/(?:services|workflows)/T[A-Za-z0-9_]+/[AB][A-Za-z0-9_]+/[A-Za-z0-9_/]{10,}"),
    )


class WebhookDetector(_TokenDetector):
    secret_type = "a webhook's address"
    denylist = (
        re.compile(r"discord(?:app)?\.com/api(?:/v\d+)?/webhooks/\d{10,}/[A-Za-z0-9_-]{20,}"),
        re.compile(r"webhook\.office\.com/webhookb2/[A-Za-z0-9@-]{20,}/[^\s'\"]+"),
    )


class GoogleKeyDetector(_TokenDetector):
    secret_type = "a Google key"
    denylist = (
        re.compile(r"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}"),
        re.compile(_BEFORE + r"GOCSPX-[A-Za-z0-9_-]{20,}"),
        re.compile(_BEFORE + r"ya29\.[A-Za-z0-9_-]{20,}"),
    )


class ModelServiceKeyDetector(_TokenDetector):
    secret_type = "an API key"
    denylist = (
        re.compile(_BEFORE + r"sk-(?:(?:ant|proj|svcacct|admin|or|lf)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})"),
        re.compile(_BEFORE + r"gsk_[A-Za-z0-9]{20,}"),
        re.compile(_BEFORE + r"nvapi-[A-Za-z0-9_-]{20,}"),
        re.compile(_BEFORE + r"r8_[A-Za-z0-9]{30,}"),
        re.compile(_BEFORE + r"(?:pplx|xai|fw|tgp_v1)[-_][A-Za-z0-9_]{32,}"),
    )
    needs_digit = True


class HostingTokenDetector(_TokenDetector):
    secret_type = "an access token"
    denylist = (
        re.compile(_BEFORE + r"do[opr]_v1_[a-f0-9]{32,}"),
        re.compile(_BEFORE + r"hv[bsr]\.[A-Za-z0-9_-]{20,}"),
        re.compile(_BEFORE + r"shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{20,}"),
        re.compile(_BEFORE + r"dapi[a-f0-9]{32}"),
    )
    needs_digit = True


class NpmTokenDetector(_TokenDetector):
    secret_type = "an npm token"
    denylist = (re.compile(_BEFORE + r"npm_[A-Za-z0-9]{30,}"), re.compile(r"_authToken\s{0,5}=\s{0,5}([A-Za-z0-9_-]{20,})"))
    needs_digit = True


class PrivateKeyDetector(RegexBasedDetector):
    secret_type = "a private key"
    denylist = (
        re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY"),
        re.compile(r"AGE-SECRET-KEY-1[A-Z0-9]{20,}"),
        re.compile(r"PuTTY-User-Key-File-\d"),
    )


class AwsAccessKeyDetector(_TokenDetector):
    secret_type = "an AWS access key"
    denylist = (re.compile(_BEFORE + r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),)


class AwsSecretKeyDetector(RegexBasedDetector):
    """Finds 40 random characters behind a word that says what they are."""

    secret_type = "an AWS secret key"
    denylist = (re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"),)

    def analyze_string(self, string: str, **_: Any) -> Generator[str, None, None]:
        for match in self.denylist[0].finditer(string):
            before = string[max(string.rfind("\n", 0, match.start()) + 1, match.start() - 60) : match.start()]
            if re.search(r"(?i)aws|secret|access_?key", before) and all(re.search(kind, match[0]) for kind in ("[a-z]", "[A-Z]", "[0-9]")):
                yield match[0]


class SignedAddressDetector(_TokenDetector):
    secret_type = "a signed address"
    denylist = (
        re.compile(r"(?<![A-Za-z0-9])sig=([A-Za-z0-9%/+_-]{30,})"),
        re.compile(r"X-(?:Amz|Goog)-Signature=([0-9a-f]{40,})"),
    )
    needs_digit = True


class WandbKeyDetector(RegexBasedDetector):
    secret_type = "a Weights & Biases key"
    denylist = (re.compile(r"(?i:wandb[a-z_ ]{0,20}key)\W{1,5}([0-9a-f]{40}(?![0-9a-f]))"),)


class TwilioKeyDetector(RegexBasedDetector):
    """Finds Twilio's keys beside its name: other names have their form."""

    secret_type = "a Twilio key"
    denylist = (re.compile(r"(?i:twilio\w{0,30})\W{1,5}((?:SK)?[0-9a-f]{32})(?![0-9a-f])"),)


class AuthorizationDetector(_ValueDetector):
    secret_type = "an authorization header"
    denylist = (
        re.compile(r"(?i:authorization['\"]?[ \t]*[:=][ \t]*['\"]?(?:bearer|basic|token)[ \t]+)([A-Za-z0-9+/._~=-]{12,})"),
        re.compile(r"(?<![A-Za-z0-9])(?i:bearer)[ \t]+([A-Za-z0-9+/._~=-]{24,})"),
    )

    def analyze_string(self, string: str, **_: Any) -> Generator[str, None, None]:
        yield from (value for value in super().analyze_string(string) if is_random(value))


class KaggleKeyDetector(RegexBasedDetector):
    secret_type = "a Kaggle key"
    denylist = (
        re.compile(r"\"username\"\s{0,9}:\s{0,9}\"[^\"]{1,60}\"\s{0,9},\s{0,9}\"key\"\s{0,9}:\s{0,9}\"([0-9a-f]{32})\""),
        re.compile(r"\"key\"\s{0,9}:\s{0,9}\"([0-9a-f]{32})\"\s{0,9},\s{0,9}\"username\""),
    )


class NetrcDetector(_ValueDetector):
    secret_type = "a password of a netrc file"
    denylist = (re.compile(r"\bmachine\s{1,20}\S{1,200}\s{1,20}(?:login\s{1,20}\S{1,200}\s{1,20})?(?:account\s{1,20}\S{1,200}\s{1,20})?password\s{1,20}(\S{4,})"),)  # fmt: skip


class AddressPasswordDetector(_ValueDetector):
    secret_type = "a password in an address"
    denylist = (re.compile(r"://[^\s/:@'\"<>]{0,200}:([^\s/@'\"<>]{1,200})@[^\s/@]"),)


class ProseAddressPasswordDetector(AddressPasswordDetector):
    """The same for training text: only passwords with a digit."""

    def analyze_string(self, string: str, **_: Any) -> Generator[str, None, None]:
        yield from (value for value in super().analyze_string(string) if re.search(r"[0-9]", value))


SECRET_NAME = (
    r"(?:pass(?:word|wd|phrase)|pwd|api[_-]?key|kaggle[_-]?key"
    r"|(?:hf|hub|hugging[_-]?face|auth|access|session|security|refresh|bot|api|github|gitlab|bearer|deploy|oauth)[_-]?token"
    r"|(?:client|app|consumer|webhook|signing|shared|jwt|oauth)[_-]?secret|secret[_-]?(?:access[_-]?)?key"
    r"|(?:private|account|signing|encryption|license)[_-]?key)"
)
_END = r"(?=[ \t]*(?:$|[,;&)}\]]|[ \t]#))"


class NamedValueDetector(RegexBasedDetector):
    """Finds values behind a name: password: …, api_key=…, --token …"""

    secret_type = "a password or key"
    denylist = (
        re.compile(rf"(?im){SECRET_NAME}['\"]?[ \t]*(?:[:=]|=>)[ \t]*(?P<quote>['\"])(?P<value>[^'\"\n]{{6,}})(?P=quote)"),
        re.compile(rf"(?im)^[\s\-{{'\"]*(?:export[ \t]+)?[\w.-]*{SECRET_NAME}['\"]?[ \t]*[:=][ \t]*(?P<value>[^\s'\"]{{6,}}?){_END}"),
        re.compile(rf"(?im){SECRET_NAME}['\"]?[ \t]*[:=][ \t]*(?P<value>[^\s'\",;&)}}\]]{{8,}}){_END}"),
        re.compile(rf"(?i)--(?:[a-z]{{1,20}}-){{0,3}}{SECRET_NAME}[ \t]+(?P<value>[^\s'\"]{{8,}})"),
    )

    def analyze_string(self, string: str, **_: Any) -> Generator[str, None, None]:
        quoted, at_line_start, inside, option = self.denylist
        for pattern in (quoted, at_line_start):
            yield from (match["value"] for match in pattern.finditer(string) if not is_placeholder(match["value"]))
        for pattern in (inside, option):  # in the middle of a line a word is more likely prose
            for match in pattern.finditer(string):
                if is_random(match["value"]) and not is_placeholder(match["value"]):
                    yield match["value"]
