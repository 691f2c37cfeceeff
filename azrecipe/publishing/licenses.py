"""The terms of Meta's licences for models built on a Llama.

They concern the licence, the name, a line in the card and a notice.

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
class LicenseTerms:
    """The terms of a licence.

    Attributes:
        license: The licence, as the hub names it.
        built_with: The line to display; empty for none.
        prefix: How the model's name must begin; empty for no rule.
        notice: The text of the file NOTICE.
        url: The licence's address.
    """

    license: str
    built_with: str
    prefix: str
    notice: str
    url: str


def find_base_terms(base: str | None) -> LicenseTerms | None:
    """Find the terms of a base model by its name.

    Returns None for a name that is no Llama's.
    """
    match = _LLAMA.search(base.rstrip("/").rsplit("/", 1)[-1]) if base else None
    version = match.group(1) if match else None
    if version not in _VERSIONS:
        return None
    meta = "Meta " if version == "3" else ""
    family = "LLAMA 2" if version == "2" else f"{meta}Llama {version}"
    return LicenseTerms(
        license=f"llama{version}",
        built_with="" if version == "2" else f"Built with {meta}Llama{' 3' if version == '3' else ''}",
        prefix="" if version == "2" else "Llama 3" if version == "3" else "Llama",
        notice=f"{family.replace('LLAMA', 'Llama')} is licensed under the {family} Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
        url=f"https://www.llama.com/llama{version.replace('.', '_')}/license/",
    )


def choose_license(option: str | None, terms: LicenseTerms | None, base: str | None) -> str | None:
    """Choose the licence for the card.

    Raises CommandError for a licence that the base's licence does not allow.
    """
    if terms is not None and option not in (None, terms.license):
        raise CommandError(
            f"--license {option}: the model is built on {base}, whose licence {terms.license} applies to models built on it ({terms.url})"
        )
    return option if terms is None else terms.license


def check_repo_name(repo_id: str, terms: LicenseTerms | None) -> str:
    """Return a warning about a name that the licence forbids, or ""."""
    name = repo_id.rsplit("/", 1)[-1]
    if terms is None or re.sub(r"[-_ ]", " ", name).startswith(terms.prefix):
        return ""
    return f"{terms.license} asks that the name of a model built on it begin with \"{terms.prefix}\" (section 1.b.i, {terms.url}), and '{name}' does not"
