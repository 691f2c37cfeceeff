"""Parse a recipe's names for groups of model parameters.

A name is a group (`embeddings`), layers as Python would slice a list (`layers[a:b]`), or a regular expression.
"""

from __future__ import annotations

import re

from azrecipe.errors import did_you_mean

NEW_TOKEN_GROUPS = ("new_tokens", "new_tokens_head")  # rows of the input matrix, rows of the output matrix
NAMED_GROUPS = ("all", "embeddings", "head", *NEW_TOKEN_GROUPS, "attention", "mlp", "norms")
ALL_GROUPS = ", ".join((*NAMED_GROUPS, "layers[a:b]"))
_LAYERS = re.compile(r"layers\[(?:(-?\d+)|(-?\d+)?:(-?\d+)?)\]")
_LIKE_LAYERS = re.compile(r"([A-Za-z_]+)\s*\[([\w:,\s-]*)\]?")


def parse_layer_range(text: str, count: int) -> range | None:
    """Return which of `count` decoder layers a name selects.

    The name is `layers[4:8]`, `layers[:-2]` or `layers[3]`. Returns None for any other text.
    """
    match = _LAYERS.fullmatch(text)
    if match is None:
        return None
    index, start, stop = (int(number) if number is not None else None for number in match.groups())
    if index is not None:
        index = index + count if index < 0 else index
        return range(index, index + 1) if 0 <= index < count else range(0)
    return range(count)[start:stop]


def find_pattern_problem(text: str) -> str | None:
    """Return what is wrong with a group name, or None.

    It is wrong if it is neither a group nor a regular expression, or looks like a misspelt group.
    """
    if text in NAMED_GROUPS or _LAYERS.fullmatch(text):
        return None
    match = _LIKE_LAYERS.fullmatch(text)
    if match is not None and did_you_mean(match[1], ("layers",)):
        indices = re.sub(r"\s+", "", match[2])
        correction = f"layers[{re.sub(r'(?<=[0-9])[-,](?=[0-9])', ':', indices)}]"
        suggestion = f"; did you mean '{correction}'?" if _LAYERS.fullmatch(correction) else "."
        return f"there is no group '{text}'{suggestion} Layers are written layers[a:b], layers[a:], layers[:b] or layers[n], as Python slices a list"
    try:
        re.compile(text)
    except re.error as error:
        return f"'{text}' is no group ({ALL_GROUPS}) and no regular expression: {error}"
    choices = NAMED_GROUPS if text.startswith("new") else [name for name in NAMED_GROUPS if name not in NEW_TOKEN_GROUPS]
    if text.isidentifier() and (suggestion := did_you_mean(text, choices)):
        return f"there is no group '{text}'{suggestion} Groups: {ALL_GROUPS}; anything else is a regular expression over parameter names"
    return None
