"""How a source becomes a store on disk: tokenised once for each tokenizer, by all cores, in order, and not lost when it breaks off.

A store is a folder: `tokens.bin` (uint32, all documents one after the other, no special tokens), `documents.bin` (RECORD,
one a document), `signatures.bin` (uint32, only for MinHash) and `meta.json`. While it is made it has another name, and
`state.json` says how much of each file, made from how many pieces of the source, is sure; what is behind that is cut off when
the work goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.data import deduplication, readers, sources
from azrecipe.data.cleaning_report import Tally, nothing_left
from azrecipe.data.sources import text_hash
from azrecipe.data.token_store import Store
from azrecipe.errors import CannotRun, RecipeError
from azrecipe.tokenization.encoding import on_disk, reader, tokenizer_hash
from azrecipe.tokenization.fast_encoding import Cutter
from azrecipe.utils.atomic_files import locked, read_json, sync_folder, sync_tree, write_json
from azrecipe.utils.process_pool import ALONE, Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from azrecipe.recipe.types import Deduplication

FORMAT = 2
COMMIT = 30.0  # seconds of work that a crash may cost
RECORD = np.dtype([("size", "<i8"), ("length", "<i8"), ("hash", "<u8", 2)])  # bytes, tokens, text_hash


@dataclass(frozen=True)
class Making:
    """What the store of a source is made by. `exclude`: the hashes of documents that are held out; `near`: MinHash's settings."""

    tokenizer: PreTrainedTokenizerBase
    exclude: frozenset[bytes]
    near: Deduplication | None = None


@dataclass
class Made:
    """What a piece, or all pieces so far, came to. `read`: bytes of text before held-out documents were taken out."""

    excluded: int = 0
    read: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    tally: Tally = field(default_factory=Tally)

    def add(self, other: Made) -> None:
        for name in ("excluded", "read", "documents", "tokens", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tally.add(other.tally)


def store(located: readers.Located, making: Making, cache: Path) -> Store:
    """The tokenised source, from the cache or made now. Processes that start together wait for the one that makes it.

    Raises RecipeError for a source without any text, CannotRun for a full disk or a source that cannot be reached; what
    was done by then is kept.
    """
    what = {
        "format": FORMAT,
        "source": sources.identity(located),
        "tokenizer": tokenizer_hash(making.tokenizer),
        "exclude": hashlib.sha256(b"".join(sorted(making.exclude))).hexdigest(),
        **({"signatures": deduplication.identity(making.near)} if making.near else {}),
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / key
    if not folder.is_dir():
        with locked(cache / f"{key}.lock", lambda: _wait(located)):
            if not folder.is_dir():
                _make(located, making, folder)
    meta = read_json(folder / "meta.json")
    records = np.memmap(folder / "documents.bin", RECORD, "r")
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum(records["length"], out=offsets[1:])
    signatures = np.memmap(folder / "signatures.bin", np.uint32, "r").reshape(len(records), -1) if making.near else None
    tokens = np.memmap(folder / "tokens.bin", np.uint32, "r")
    sizes = np.ascontiguousarray(records["size"])
    return Store(key, tokens, offsets, sizes, meta["excluded"], meta.get("cleaned"), records["hash"], signatures)


def _wait(located: readers.Located) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"  waiting for another process that tokenises {located.title}", file=sys.stderr, flush=True)


def _make(located: readers.Located, making: Making, folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    told = Progress(located.title)
    with _pinned(located) as (pinned, revision), _Log(aside, making.near is not None, revision) as log, _explained(located, log):
        if log.pieces:
            told.say(log.made, f"going on after {log.made.documents:,} documents that were tokenised before")
        for made, arrays in _worked(pinned, making, log):
            log.append(made, arrays)
            told.now(log.made)
        made = log.made
        if not made.documents:
            why = f" ({made.excluded} documents are all held out)" if made.excluded else ""
            raise located.wrong(f"{located.title} holds no text{why}{nothing_left(made.tally)}")
    counts = {"title": located.title, "documents": made.documents, "tokens": made.tokens, "bytes": made.bytes, "excluded": made.excluded}
    write_json(aside / "meta.json", counts | ({"cleaned": made.tally.report()} if located.cleaned else {}))
    sync_tree(aside)
    with suppress(OSError) if folder.exists() else ExitStack():  # another machine may have made the same
        aside.replace(folder)
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
    (folder / "state.json").unlink(missing_ok=True)
    told.say(made, "done", seconds=5)


def _worked(located: readers.Located, making: Making, log: _Log) -> Iterator[tuple[Made, list[npt.NDArray[Any]]]]:
    """Every piece that is not in the log yet, made by as many processes as there are cores, in order, up to max_bytes."""
    source = sources.Reader(located)
    limit = source.source.max_bytes
    if limit is not None and log.made.read >= limit:
        return
    with TemporaryDirectory() as folder, on_disk(making.tokenizer) as tokenizer, Workers(alone=ALONE) as workers:
        file = Path(folder, "work")  # once for each process: with each piece it would be much to send
        file.write_bytes(pickle.dumps((located, tokenizer, making.exclude, making.near)))
        held: list[readers.Piece] = []
        pieces = islice(readers.pieces(located, source.columns), log.pieces, None)

        def given() -> Iterator[readers.Piece]:
            for piece in pieces:
                if limit is not None:
                    held.append(piece)
                yield piece

        for made, arrays in workers.map(_work, (str(file),), given(), lambda piece: piece.size):
            if limit is not None and log.made.read + made.read >= limit:
                yield _work(str(file), held[0], limit - log.made.read)  # again, up to the document that reaches the limit
                return
            del held[:1]
            yield made, arrays


@lru_cache(maxsize=1)
def _opened(file: str) -> tuple[sources.Reader, Cutter, frozenset[bytes], Deduplication | None]:
    located, tokenizer, exclude, near = pickle.loads(Path(file).read_bytes())
    return sources.Reader(located), Cutter(reader(tokenizer)), exclude, near


def _work(file: str, piece: readers.Piece, limit: int | None = None) -> tuple[Made, list[npt.NDArray[Any]]]:
    """One piece of the source: its tokens, the RECORDs of its documents, and their signatures."""
    source, cut, exclude, near = _opened(file)
    made = Made()
    kept: list[str] = []
    hashes: list[bytes] = []
    for document in sources.until(source.read(piece.rows(source.located, source.source.text_column), made.tally), limit):
        own = text_hash(document.text)
        made.read += len(document.text.encode())
        if own in exclude or document.came in exclude:
            made.excluded += 1
        else:
            kept.append(document.text)
            hashes.append(own)
    records = np.zeros(len(kept), RECORD)
    records["size"] = [len(text.encode()) for text in kept]
    records["hash"] = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    tokens = cut(kept)
    records["length"] = [len(ids) for ids in tokens]
    made.documents, made.tokens, made.bytes = len(kept), int(records["length"].sum()), int(records["size"].sum())
    arrays = [np.concatenate([np.zeros(0, np.uint32), *tokens]), records]
    return made, arrays + ([deduplication.signatures(kept, near)] if near else [])


class _Log:
    """The files of a store that is being made. What `commit` has seen is found again by the next process."""

    def __init__(self, folder: Path, signatures: bool, revision: str | None) -> None:
        self.folder, self.revision = folder, revision
        self.names = ["tokens.bin", "documents.bin", *(["signatures.bin"] if signatures else [])]
        self.pieces, self.made, self.sizes = 0, Made(), [0] * len(self.names)
        self.files: list[IO[bytes]] = []
        self.saved = time.monotonic()

    def __enter__(self) -> _Log:
        if not self._restore():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.pieces, self.made, self.sizes = 0, Made(), [0] * len(self.names)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, size in zip(self.names, self.sizes, strict=True):
            file = (self.folder / name).open("ab")
            self.files.append(file)
            file.truncate(size)
        return self

    def _restore(self) -> bool:
        """Take over what a process that broke off has left, if it is of the same revision and all there."""
        try:
            state = read_json(self.folder / "state.json")
            self.pieces, self.sizes, revision = state["pieces"], state["sizes"], state["revision"]
            self.made = Made(**{**state["made"], "tally": Tally.unpacked(state["made"]["tally"])})
            there = [(self.folder / name).stat().st_size for name in self.names]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return (
            revision == self.revision
            and state["cut"] == [readers.PIECE, readers.BATCH]
            and all(size >= sure for size, sure in zip(there, self.sizes, strict=True))
        )

    def append(self, made: Made, arrays: list[npt.NDArray[Any]]) -> None:
        for file, array in zip(self.files, arrays, strict=True):
            file.write(array.tobytes())
        for i, array in enumerate(arrays):
            self.sizes[i] += array.nbytes
        self.made.add(made)
        self.pieces += 1
        if time.monotonic() > self.saved + COMMIT:
            self.commit()

    def commit(self) -> None:
        """Make sure of all that was appended."""
        if self.revision is None:
            return
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        made = {**vars(self.made), "tally": self.made.tally.packed()}
        state = {"revision": self.revision, "cut": [readers.PIECE, readers.BATCH], "pieces": self.pieces, "sizes": self.sizes, "made": made}
        write_json(self.folder / "state.json", state)
        self.saved = time.monotonic()

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            with suppress(OSError):
                file.close()


@contextmanager
def _explained(located: readers.Located, log: _Log) -> Iterator[None]:
    """Keep what is done when the work breaks off; a source that is wrong leaves nothing. A full disk is told in words."""
    try:
        yield
        for file in log.files:
            file.flush()
    except RecipeError:
        shutil.rmtree(log.folder, ignore_errors=True)
        raise
    except BaseException as error:
        with suppress(OSError):
            log.commit()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotRun(
                f"the disk is full: no room in {log.folder.parent} for the tokens of {located.title}. "
                "Free space, then run the same command again: it goes on from there"
            ) from None
        raise


@contextmanager
def _pinned(located: readers.Located) -> Iterator[tuple[readers.Located, str | None]]:
    """The source at one revision, and a name for that: work that breaks off must not go on with other text.

    Files are known by their content already. None where the hub does not say which commit a revision is: then work that
    breaks off begins anew.
    """
    if located.in_files:
        yield located, "files"
        return
    commit = None
    with suppress(Exception):  # no network: the dataset may be in the hub's cache
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(located.source.path, revision=located.source.revision, timeout=20).sha
    yield (replace(located, source=replace(located.source, revision=commit)) if commit else located), commit


class Progress:
    """A line every 15 seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.began = self.last = time.monotonic()
        self.first: tuple[int, int] | None = None

    def now(self, made: Made) -> None:
        if self.first is None:
            self.first = (made.tokens, made.read)
        if time.monotonic() > self.last + 15:
            self.say(made)

    def say(self, made: Made, more: str = "", seconds: float = 0) -> None:
        """A line about all that is done, where it took longer than `seconds`."""
        self.last = time.monotonic()
        took = self.last - self.began
        if took < seconds:
            return
        tokens, read = self.first or (made.tokens, made.read)
        rate = f", {(made.tokens - tokens) / took:,.0f} tokens/s, {(made.read - read) / 1e6 / took:.1f} MB/s" if took > 1 else ""
        done = f"{made.documents:,} documents, {made.tokens:,} tokens{rate}"
        print(f"  tokenising {self.title}: {more or done}{f' ({done})' if more else ''}", file=sys.stderr, flush=True)
