"""Tokenising much text quickly: what stands between spaces is cut once and remembered, with the ids that the whole text would get."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
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
TOGETHER = 200
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
        self.widths = np.zeros(backend.get_vocab_size() if self.by_parts else 0, np.int64)  # bytes of each token
        if self.by_parts:
            special = {token.content for token in backend.get_added_tokens_decoder().values()}
            for token, i in backend.get_vocab(with_added_tokens=False).items():
                self.widths[i] = 0 if token in special else len(token)  # byte-level: a character of a token is a byte

    def __call__(self, texts: list[str]) -> list[Ids]:
        """The ids of each text."""
        if not self.by_parts:
            return [np.asarray(ids, np.uint32) for ids in self._whole(texts)]
        cut = [_BORDER.split(text) for text in texts]
        known = self.known
        new = list({part: None for parts in cut for part in parts if part not in known})
        known.update(self._learned(new))
        made = []
        for parts in cut:
            ids: list[int] = []
            for part in parts:
                ids += known[part]
            made.append(np.array(ids, np.uint32))
        if len(known) > REMEMBERED:
            known.clear()
            new = []
        for part in new:
            if len(part) > LONG:
                del known[part]
        return made

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for chunk in chunks(texts) for e in self.backend.encode_batch_fast(chunk, add_special_tokens=False)]

    def _learned(self, new: list[str]) -> Iterator[tuple[str, list[int]]]:
        """The ids of parts. A call costs far more than a part: those that a border may stand between go in together."""
        inner = [part for part in new if part[:1] == " " and not part[-1].isspace()]
        outer = [part for part in new if part[:1] != " " or part[-1].isspace()]
        yield from zip(outer, self._whole(outer), strict=True)
        rows = [inner[i : i + TOGETHER] for i in range(0, len(inner), TOGETHER)]
        for row, ids in zip(rows, self._whole(["".join(row) for row in rows]), strict=True):
            read = np.cumsum(self.widths[ids])
            ends = np.cumsum([len(part.encode()) for part in row])
            if not len(read) or read[-1] != ends[-1]:  # a vocabulary that lacks bytes
                yield from zip(row, self._whole(row), strict=True)
                continue
            begin = 0
            for part, end in zip(row, (np.searchsorted(read, ends) + 1).tolist(), strict=True):
                yield part, ids[begin:end]
                begin = end


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
