"""Encode much text quickly, with a cache of words.

The ids are those that the tokenizer gives the whole text.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.tokenization.encoding import UnencodableTextError, batch_texts, encode_batch
from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.uint32]

MAX_CACHED_PARTS = 400_000  # of at most MAX_CACHED_CHARACTERS each: some 40 MB
MAX_CACHED_CHARACTERS = 40
WORDS_PER_CALL = 200
# Where every match of LLAMA3_SPLIT ends: before a space that follows no white space (a branch that matches white space begins
# with it), and between a letter and ASCII that is no letter or digit (no branch continues after its letters). No branch looks
# back. So the parts between borders match alike alone and within the text. The letters are in every version of Unicode.
_BORDER = re.compile(r"(?<=\S)(?= )|(?<=[A-Za-zÀ-ÖØ-öø-ɏЀ-ҁҊ-ԯؠ-ي])(?=[!-/:-@\[-`{-~\n])")


class FastEncoder:
    """Encodes plain text without special tokens.

    Special tokens spelled out in the text stay ordinary text. The encoder changes the backend that it uses.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        self.by_parts = _can_encode_parts(backend)
        # Ids are stored as the bytes of uint32, which join quickly. A word is the text between two spaces: str.split is far
        # faster than a regular expression. None: the word may continue after the space
        self.words: dict[str, Any] = {}
        self.parts: dict[str, bytes] = {}  # those that do not begin with a space, or end in white space
        self.long_parts: list[str] = []
        self.widths = np.zeros(backend.get_vocab_size() if self.by_parts else 0, np.int64)  # bytes of each token
        if self.by_parts:
            special = {token.content for token in backend.get_added_tokens_decoder().values()}
            for token, i in backend.get_vocab(with_added_tokens=False).items():
                self.widths[i] = 0 if token in special else len(token)  # byte-level: each character of a token is a byte

    def __call__(self, texts: list[str]) -> list[Ids]:
        """Encode texts, [tokens] each.

        Raises UnencodableTextError where the library fails on one.
        """
        try:
            return self._encode(texts)
        except UnencodableTextError:  # it names a part of a text
            encode_batch(self.backend, texts)
            raise

    def _encode(self, texts: list[str]) -> list[Ids]:
        if not self.by_parts:
            return [np.asarray(ids, np.uint32) for ids in self._encode_whole(texts)]
        split = [text.split(" ") for text in texts]
        words = set[str]().union(*(row[1:-1] for row in split))
        self._encode_words(words.difference(self.words))
        middles = [self._join_middle(row) for row in split]
        ends = [
            (_BORDER.split(text), []) if middle is None else (_BORDER.split(row[0]), _BORDER.split(f" {row[-1]}"))
            for text, row, middle in zip(texts, split, middles, strict=True)
        ]
        self._encode_parts({part for pair in ends for parts in pair for part in parts})
        encoded = [
            np.frombuffer(b"".join([*map(self._get_ids, first), middle or b"", *map(self._get_ids, last)]), np.uint32)
            for (first, last), middle in zip(ends, middles, strict=True)
        ]
        self._shrink_cache(words)
        return encoded

    def _join_middle(self, row: list[str]) -> bytes | None:
        """Join the ids of a text's words but the first and last.

        Returns None where not every space is a border.
        """
        if len(row) < 2 or row[0][-1:].isspace():
            return None
        try:
            return b"".join(map(self.words.__getitem__, row[1:-1]))
        except TypeError:
            return None

    def _get_ids(self, part: str) -> bytes:
        ids: bytes | None = self.words.get(part[1:]) if part[:1] == " " else None
        return self.parts[part] if ids is None else ids

    def _encode_words(self, new: set[str]) -> None:
        """Encode words: those of letters at once, others by parts."""
        plain = [word for word in new if word.isalpha()]
        parts_of_word = {word: _BORDER.split(f" {word}") for word in new.difference(plain) if word and not word[-1].isspace()}
        self.words.update((word, None) for word in new.difference(plain, parts_of_word))
        self._encode_plain_words(plain)
        self._encode_parts({part for parts in parts_of_word.values() for part in parts})
        self.words.update((word, b"".join(map(self._get_ids, parts))) for word, parts in parts_of_word.items() if len(parts) > 1)
        self.long_parts += [word for word in new if len(word) > MAX_CACHED_CHARACTERS]

    def _encode_parts(self, parts: set[str]) -> None:
        new = [part for part in parts if part not in self.parts and (part[:1] != " " or self.words.get(part[1:]) is None)]
        words = [part[1:] for part in new if part[:1] == " " and " " not in part[1:] and not part[-1].isspace()]
        self._encode_plain_words(words)
        others = [part for part in new if part[:1] != " " or " " in part[1:] or part[-1].isspace()]
        self.parts.update((part, np.array(ids, np.uint32).tobytes()) for part, ids in zip(others, self._encode_whole(others), strict=True))
        self.long_parts += [part for part in new if len(part) > MAX_CACHED_CHARACTERS]

    def _encode_plain_words(self, words: list[str]) -> None:
        """Encode words with a border on both sides.

        Many go into a call, since calls are slow.
        """
        rows = [words[i : i + WORDS_PER_CALL] for i in range(0, len(words), WORDS_PER_CALL)]
        lines = [f" {' '.join(row)}" for row in rows]
        for row, text, ids in zip(rows, lines, self._encode_whole(lines), strict=True):
            byte_ends = np.cumsum(self.widths[ids])
            spaces = np.flatnonzero(np.frombuffer(text.encode(), np.uint8) == ord(" "))
            if not len(byte_ends) or byte_ends[-1] != len(text.encode()):  # the vocabulary lacks bytes
                single_ids = self._encode_whole([f" {word}" for word in row])
                self.words.update((word, np.array(word_ids, np.uint32).tobytes()) for word, word_ids in zip(row, single_ids, strict=True))
                continue
            starts = [0, *(4 * (np.searchsorted(byte_ends, spaces[1:]) + 1)).tolist(), 4 * len(ids)]
            data = np.array(ids, np.uint32).tobytes()
            self.words.update((word, data[starts[n] : starts[n + 1]]) for n, word in enumerate(row))

    def _shrink_cache(self, words: set[str]) -> None:
        """Remove long parts, which hardly occur again, and shrink a large cache.

        A large cache keeps the words of the current texts only.
        """
        for part in self.long_parts:
            self.words.pop(part, None)
            self.words.pop(part[1:], None)
            self.parts.pop(part, None)
        self.long_parts.clear()
        if len(self.words) + len(self.parts) > MAX_CACHED_PARTS:
            self.words = {word: self.words[word] for word in words if word in self.words}
            self.parts.clear()

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for chunk in batch_texts(texts) for encoding in encode_batch(self.backend, chunk)]


def _can_encode_parts(backend: Tokenizer) -> bool:
    """Whether text can be encoded part by part.

    That needs Llama 3's split rule, no normaliser, and no added token that the library searches texts for.
    """
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
