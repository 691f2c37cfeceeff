"""Knows what Meta's licences ask of a model that is built on a Llama: its licence, its name, a line in the card and a notice.

Llama 3.2 Community License, section 1.b (https://www.llama.com/llama3_2/license/): i. who distributes a derivative provides a copy of
the agreement and displays "Built with Llama" prominently; a model that is trained from a Llama has "Llama" at the beginning of its
name. iii. Copies carry the attribution notice in a text file "Notice". Those of 3.1, 3.3 and 4 ask the same; that of Llama 3 asks for
"Built with Meta Llama 3" and a name that begins with "Llama 3"; that of Llama 2 for the notice only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from azrecipe.errors import CommandError

_LLAMA = re.compile(r"llama[-_ ]?(\d(?:\.\d)?)", re.IGNORECASE)
_VERSIONS = ("2", "3", "3.1", "3.2", "3.3", "4")


@dataclass(frozen=True)
class Terms:
    """What a licence asks. `built_with` and `prefix` are empty where it asks for none."""

    license: str
    built_with: str
    prefix: str
    notice: str
    url: str


def of_base(base: str | None) -> Terms | None:
    """The terms that come with a base model, by its name; None for one that is no Llama, as far as its name tells."""
    found = _LLAMA.search(base.rstrip("/").rsplit("/", 1)[-1]) if base else None
    version = found.group(1) if found else None
    if version not in _VERSIONS:
        return None
    meta = "Meta " if version == "3" else ""
    named = "LLAMA 2" if version == "2" else f"{meta}Llama {version}"
    return Terms(
        license=f"llama{version}",
        built_with="" if version == "2" else f"Built with {meta}Llama{' 3' if version == '3' else ''}",
        prefix="" if version == "2" else "Llama 3" if version == "3" else "Llama",
        notice=f"{named.replace('LLAMA', 'Llama')} is licensed under the {named} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        url=f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
    )


def chosen(asked: str | None, terms: Terms | None, base: str | None) -> str | None:
    """The licence for the card. Raises CommandError for one that the base's licence does not allow."""
    if terms is not None and asked not in (None, terms.license):
        raise CommandError(
            f"--license {asked}: the model is built on {base}, whose licence is {terms.license} and goes with what is made of it ({terms.url})"
        )
    return asked if terms is None else terms.license


def misnamed(repo_id: str, terms: Terms | None) -> str:
    """A warning for a repository whose name the licence does not allow, or ""."""
    name = repo_id.rsplit("/", 1)[-1]
    if terms is None or re.sub(r"[-_ ]", " ", name).startswith(terms.prefix):
        return ""
    return f"{terms.license} asks that the name of a model built on it begin with \"{terms.prefix}\" (section 1.b.i, {terms.url}), and '{name}' does not"
