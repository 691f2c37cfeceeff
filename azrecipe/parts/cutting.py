"""Tokenising much text quickly: what stands between spaces is cut once and remembered, with the ids that the whole text would get."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.parts.tokens import chunks
from azrecipe.parts.vocabulary import LLAMA3_SPLIT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint32]

REMEMBERED = 200_000  # parts of text, of at most LONG characters: some 40 MB
LONG = 40
# Where every match of LLAMA3_SPLIT ends: before a space that follows no white space (what takes white space begins with it), and
# between a letter and ASCII that is none and no digit (nothing takes what follows its letters). Nothing looks behind. So
# the parts between such places are matched alike alone and within the text. The letters are those that every version of Unicode has.
_BORDER = re.compile(r"(?<=\S)(?= )|(?<=[A-Za-zÀ-ÖØ-öø-ɏЀ-ҁҊ-ԯؠ-ي])(?=[!-/:-@\[-`{-~\n])")


class Cutter:
    """A tokenizer's ids of plain text: special tokens spelled out in it stay ordinary text, and none are added."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        self.by_parts = _by_parts(backend)
        self.known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> list[Ids]:
        """The ids of each text."""
        if not self.by_parts:
            return [np.asarray(ids, np.uint32) for ids in self._whole(texts)]
        return [self._parts(_BORDER.split(text)) for text in texts]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for chunk in chunks(texts) for e in self.backend.encode_batch_fast(chunk, add_special_tokens=False)]

    def _parts(self, parts: list[str]) -> Ids:
        known = self.known
        new = list({part: None for part in parts if part not in known})
        if new:
            if len(known) > REMEMBERED:
                known.clear()
                new = list(dict.fromkeys(parts))
            known.update(zip(new, self._whole(new), strict=True))
        ids: list[int] = []
        for part in parts:
            ids += known[part]
        for part in new:
            if len(part) > LONG:
                del known[part]
        return np.array(ids, np.uint32)


def _by_parts(backend: Tokenizer) -> bool:
    """Whether text may be cut part by part: Llama 3's way to split, no normalizer, and no added token that text is searched for."""
    data: dict[str, Any] = json.loads(backend.to_str())
    splitter = data.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", []) if splitter.get("type") == "Sequence" else [splitter]
    return (
        data.get("normalizer") is None
        and data["model"]["type"] == "BPE"
        and not data["model"].get("dropout")
        and all(token["special"] for token in data.get("added_tokens", []))
        and [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] == {"Regex": LLAMA3_SPLIT}
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and not steps[1]["add_prefix_space"]
        and not steps[1]["use_regex"]
    )
