"""Knows the names by which a recipe speaks of a model's parameters: named groups, and `layers[a:b]` as Python would slice."""

from __future__ import annotations

import re

from azrecipe.errors import did_you_mean

NEW_TOKENS = ("new_tokens", "new_tokens_head")  # of the input matrix, of the output matrix
NAMED = ("all", "embeddings", "head", *NEW_TOKENS, "attention", "mlp", "norms")
ALL = ", ".join((*NAMED, "layers[a:b]"))
_LAYERS = re.compile(r"layers\[(?:(-?\d+)|(-?\d+)?:(-?\d+)?)\]")
_LIKE_LAYERS = re.compile(r"([A-Za-z_]+)\s*\[([\w:,\s-]*)\]?")


def layers(text: str, count: int) -> range | None:
    """Which of `count` decoder layers a group means: `layers[4:8]`, `layers[:-2]`, `layers[3]`; None for any other text."""
    found = _LAYERS.fullmatch(text)
    if found is None:
        return None
    one, first, last = (int(number) if number is not None else None for number in found.groups())
    if one is not None:
        place = one + count if one < 0 else one
        return range(place, place + 1) if 0 <= place < count else range(0)
    return range(count)[first:last]


def problem(text: str) -> str | None:
    """What is wrong with a pattern that is neither a group nor a regular expression, or that looks like a misspelt group."""
    if text in NAMED or _LAYERS.fullmatch(text):
        return None
    like = _LIKE_LAYERS.fullmatch(text)
    if like is not None and did_you_mean(like[1], ("layers",)):
        inside = re.sub(r"\s+", "", like[2])
        wanted = f"layers[{re.sub(r'(?<=[0-9])[-,](?=[0-9])', ':', inside)}]"
        near = f"; did you mean '{wanted}'?" if _LAYERS.fullmatch(wanted) else "."
        return (
            f"there is no group '{text}'{near} Layers are written layers[a:b], layers[a:], layers[:b] or layers[n], as Python slices a list"
        )
    try:
        re.compile(text)
    except re.error as error:
        return f"'{text}' is no group ({ALL}) and no regular expression: {error}"
    known = NAMED if text.startswith("new") else [name for name in NAMED if name not in NEW_TOKENS]
    if text.isidentifier() and (near := did_you_mean(text, known)):
        return f"there is no group '{text}'{near} Groups: {ALL}; anything else is a regular expression over parameter names"
    return None
