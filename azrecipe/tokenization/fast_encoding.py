"""Tokenising much text quickly: what stands between spaces is cut once and remembered, with the ids that the whole text would get."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.tokenization.encoding import batch_texts
from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint32]

MAX_CACHED_PARTS = 400_000  # parts of text, of at most LONG characters: some 40 MB
MAX_CACHED_CHARACTERS = 40
WORDS_PER_CALL = 200
# Where every match of LLAMA3_SPLIT ends: before a space that follows no white space (what takes white space begins with it), and
# between a letter and ASCII that is none and no digit (nothing takes what follows its letters). Nothing looks behind. So
# the parts between such places are matched alike alone and within the text. The letters are those that every version of Unicode has.
_BORDER = re.compile(r"(?<=\S)(?= )|(?<=[A-Za-zÀ-ÖØ-öø-ɏЀ-ҁҊ-ԯؠ-ي])(?=[!-/:-@\[-`{-~\n])")


class FastEncoder:
    """A tokenizer's ids of plain text: special tokens spelled out in it stay ordinary text, and none are added."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        self.by_parts = _by_parts(backend)
        # Ids are kept as the bytes of uint32, which join quickly. A word is what follows a space up to the next one: most of a text
        # is split by str.split, far faster than by a regular expression. None: what comes behind may belong to it
        self.words: dict[str, Any] = {}
        self.parts: dict[str, bytes] = {}  # what begins with no space, or ends in white space
        self.long: list[str] = []
        self.widths = np.zeros(backend.get_vocab_size() if self.by_parts else 0, np.int64)  # bytes of each token
        if self.by_parts:
            special = {token.content for token in backend.get_added_tokens_decoder().values()}
            for token, i in backend.get_vocab(with_added_tokens=False).items():
                self.widths[i] = 0 if token in special else len(token)  # byte-level: a character of a token is a byte

    def __call__(self, texts: list[str]) -> list[Ids]:
        """The ids of each text."""
        if not self.by_parts:
            return [np.asarray(ids, np.uint32) for ids in self._whole(texts)]
        split = [text.split(" ") for text in texts]
        words = set[str]().union(*(row[1:-1] for row in split))
        self._learn_words(words.difference(self.words))
        middles = [self._middle(row) for row in split]
        ends = [
            (_BORDER.split(text), []) if middle is None else (_BORDER.split(row[0]), _BORDER.split(f" {row[-1]}"))
            for text, row, middle in zip(texts, split, middles, strict=True)
        ]
        self._learn({part for pair in ends for parts in pair for part in parts})
        made = [
            np.frombuffer(b"".join([*map(self._of, first), middle or b"", *map(self._of, last)]), np.uint32)
            for (first, last), middle in zip(ends, middles, strict=True)
        ]
        self._forget(words)
        return made

    def _middle(self, row: list[str]) -> bytes | None:
        """The ids of a text's words but the first and last; None where not every space is a border."""
        if len(row) < 2 or row[0][-1:].isspace():
            return None
        try:
            return b"".join(map(self.words.__getitem__, row[1:-1]))
        except TypeError:
            return None

    def _of(self, part: str) -> bytes:
        found: bytes | None = self.words.get(part[1:]) if part[:1] == " " else None
        return self.parts[part] if found is None else found

    def _learn_words(self, new: set[str]) -> None:
        """Words as they stand between spaces, into `words`: those of letters alone at once, others by their parts."""
        plain = [word for word in new if word.isalpha()]
        cut = {word: _BORDER.split(f" {word}") for word in new.difference(plain) if word and not word[-1].isspace()}
        self.words.update((word, None) for word in new.difference(plain, cut))
        self._learn_plain(plain)
        self._learn({part for parts in cut.values() for part in parts})
        self.words.update((word, b"".join(map(self._of, parts))) for word, parts in cut.items() if len(parts) > 1)
        self.long += [word for word in new if len(word) > MAX_CACHED_CHARACTERS]

    def _learn(self, parts: set[str]) -> None:
        new = [part for part in parts if part not in self.parts and (part[:1] != " " or self.words.get(part[1:]) is None)]
        words = [part[1:] for part in new if part[:1] == " " and " " not in part[1:] and not part[-1].isspace()]
        self._learn_plain(words)
        others = [part for part in new if part[:1] != " " or " " in part[1:] or part[-1].isspace()]
        self.parts.update((part, np.array(ids, np.uint32).tobytes()) for part, ids in zip(others, self._whole(others), strict=True))
        self.long += [part for part in new if len(part) > MAX_CACHED_CHARACTERS]

    def _learn_plain(self, words: list[str]) -> None:
        """Words with a border on both sides. A call costs far more than a word: many go in together."""
        rows = [words[i : i + WORDS_PER_CALL] for i in range(0, len(words), WORDS_PER_CALL)]
        together = [f" {' '.join(row)}" for row in rows]
        for row, text, ids in zip(rows, together, self._whole(together), strict=True):
            read = np.cumsum(self.widths[ids])
            spaces = np.flatnonzero(np.frombuffer(text.encode(), np.uint8) == ord(" "))
            if not len(read) or read[-1] != len(text.encode()):  # a vocabulary that lacks bytes
                alone = self._whole([f" {word}" for word in row])
                self.words.update((word, np.array(own, np.uint32).tobytes()) for word, own in zip(row, alone, strict=True))
                continue
            begins = [0, *(4 * (np.searchsorted(read, spaces[1:]) + 1)).tolist(), 4 * len(ids)]
            data = np.array(ids, np.uint32).tobytes()
            self.words.update((word, data[begins[n] : begins[n + 1]]) for n, word in enumerate(row))

    def _forget(self, words: set[str]) -> None:
        """What is long will hardly come again; where much is remembered, only the words of the texts just now stay."""
        for part in self.long:
            self.words.pop(part, None)
            self.words.pop(part[1:], None)
            self.parts.pop(part, None)
        self.long.clear()
        if len(self.words) + len(self.parts) > MAX_CACHED_PARTS:
            self.words = {word: self.words[word] for word in words if word in self.words}
            self.parts.clear()

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for chunk in batch_texts(texts) for e in self.backend.encode_batch_fast(chunk, add_special_tokens=False)]


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
