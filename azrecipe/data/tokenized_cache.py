"""Tokenise a source once per tokenizer, and cache the result on disk.

All cores tokenise pieces of the source, and the pieces are written in order. A store is a folder: `tokens.bin` (uint32, all
documents one after the other, no special tokens), `documents.bin` (DOCUMENT_DTYPE, one a document), `signatures.bin`
(uint32, only for MinHash) and `meta.json`. While it is written it has another name, and `state.json` says how many bytes of
each file, from how many pieces of the source, are safely on disk. A process that continues cuts the files to these bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from azrecipe.data import deduplication, readers, sources
from azrecipe.data.cleaning_report import explain_missing_text
from azrecipe.data.sources import hash_text
from azrecipe.data.token_store import TokenStore
from azrecipe.data.tokenize_progress import PieceStats, TokenizeProgress
from azrecipe.errors import CannotRun, RecipeError, SourceLocation, get_first_line
from azrecipe.tokenization.encoding import UnencodableTextError, hash_tokenizer, load_backend, write_backend_file
from azrecipe.tokenization.fast_encoding import FastEncoder
from azrecipe.utils.atomic_files import hold_lock, read_json, sync_folder, sync_tree, write_json
from azrecipe.utils.checksums import compute_checksum, find_damaged_file
from azrecipe.utils.console import print_progress
from azrecipe.utils.process_pool import MIN_POOL_CHARACTERS, WorkerPool
from azrecipe.utils.shared_digests import name_launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from azrecipe.recipe.types import Deduplication

CACHE_FORMAT = 2
COMMIT_SECONDS = 30.0  # the most work that a crash may cost
DOCUMENT_DTYPE = np.dtype([("size", "<i8"), ("length", "<i8"), ("hash", "<u8", 2)])  # bytes, tokens, hash_text


@dataclass(frozen=True)
class TokenizeSpec:
    """How sources are tokenised.

    Attributes:
        tokenizer: The tokenizer.
        excluded_hashes: Hashes of the held-out documents, which are left out.
        minhash: The settings of MinHash signatures; None: no signatures.
    """

    tokenizer: PreTrainedTokenizerBase
    excluded_hashes: frozenset[bytes]
    minhash: Deduplication | None = None


TokenizedPiece = tuple[PieceStats, list[npt.NDArray[Any]]]  # the arrays are in the order of the files


def load_or_tokenize(source: readers.DataSource, spec: TokenizeSpec, cache: Path) -> TokenStore:
    """Tokenise a source, or read the result from the cache.

    Processes that start together wait for the one that tokenises.

    Raises:
        RecipeError: The source has no text.
        CannotRun: The disk is full, or the source cannot be read; the work so far is kept.
    """
    inputs = {
        "format": CACHE_FORMAT,
        "source": sources.describe_source(source),
        "tokenizer": hash_tokenizer(spec.tokenizer),
        "exclude": hashlib.sha256(b"".join(sorted(spec.excluded_hashes))).hexdigest(),
        **({"signatures": deduplication.describe_signatures(spec.minhash)} if spec.minhash else {}),
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / key
    if not folder.is_dir() or _find_damage(folder):
        with hold_lock(cache / f"{key}.lock", lambda: _print_waiting(source)):
            if folder.is_dir() and (damage := _find_damage(folder)):
                print_progress(f"  {folder}: {damage}: {source.title} is tokenised again", os.environ.get("RANK", "0") == "0")
                shutil.rmtree(folder)
            if not folder.is_dir():
                _tokenize_source(source, spec, folder)
    meta = read_json(folder / "meta.json")
    records = np.memmap(folder / "documents.bin", DOCUMENT_DTYPE, "r")
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum(records["length"], out=offsets[1:])
    signatures = np.memmap(folder / "signatures.bin", np.uint32, "r").reshape(len(records), -1) if spec.minhash else None
    return TokenStore(
        key,
        tokens=np.memmap(folder / "tokens.bin", np.uint32, "r"),
        offsets=offsets,
        sizes=np.ascontiguousarray(records["size"]),
        num_held_out=meta["excluded"],
        cleaning_report=meta.get("cleaned"),
        hashes=records["hash"],
        signatures=signatures,
    )


def _find_damage(folder: Path) -> str:
    """Say what of a store is not as it was written, or "".

    Every byte is read, by one process of each machine. Stores of earlier versions have no checksums: their counts must fit the sizes of the files.
    """
    try:
        meta = read_json(folder / "meta.json")
        checksums = meta.get("xxh3_128")
        if checksums is not None:
            shares = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
            name = find_damaged_file(folder, checksums, name_launch() if shares else None)
            return f"the checksum of {name} differs" if name else ""
        records = np.fromfile(folder / "documents.bin", DOCUMENT_DTYPE)
        lengths = records["length"]
        counts = [len(records), int(lengths.sum()), (folder / "tokens.bin").stat().st_size]
        fits = counts == [meta["documents"], meta["tokens"], 4 * meta["tokens"]] and not (lengths < 0).any()
        return "" if fits else "the files do not have the sizes that meta.json says"
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError) as error:
        return f"a file is missing or damaged ({get_first_line(error)})"


def _print_waiting(source: readers.DataSource) -> None:
    if os.environ.get("RANK", "0") == "0":
        print_progress(f"  waiting for another process that tokenises {source.title}")


def _tokenize_source(source: readers.DataSource, spec: TokenizeSpec, folder: Path) -> None:
    """Tokenise a source into a folder, which appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    progress = TokenizeProgress(source.title)
    with (
        _pin_revision(source) as (pinned, revision),
        _StoreWriter(partial, spec.minhash is not None, revision) as writer,
        _keep_work(source, writer),
    ):
        if writer.num_pieces:
            progress.print_line(writer.stats, f"continuing after {writer.stats.documents:,} documents that were tokenised before")
        for piece_stats, arrays in _tokenize_pieces(pinned, spec, writer):
            writer.append(piece_stats, arrays)
            progress.update(writer.stats)
        stats = writer.stats
        if not stats.documents:
            reason = f" ({stats.num_held_out} documents are all held out)" if stats.num_held_out else ""
            raise source.error(f"{source.title} holds no text{reason}{explain_missing_text(stats.report)}")
    meta = {
        "title": source.title,
        "documents": stats.documents,
        "tokens": stats.tokens,
        "bytes": stats.bytes,
        "excluded": stats.num_held_out,
        **({"cleaned": stats.report.to_dict()} if source.has_report(stats.report) else {}),
    }
    checksums = {name: compute_checksum(partial / name) for name in writer.names}
    write_json(partial / "meta.json", {**meta, "xxh3_128": checksums})
    sync_tree(partial)
    with suppress(OSError) if folder.exists() else ExitStack():  # another machine may have written the same
        partial.replace(folder)
    sync_folder(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)
    (folder / "state.json").unlink(missing_ok=True)
    progress.print_line(stats, "done", min_seconds=5)
    sources.announce_long_documents(source, stats.report)


class _WorkerInputs(NamedTuple):
    """What a process needs to tokenise pieces, as it is pickled."""

    source: readers.DataSource
    tokenizer_file: str
    excluded_hashes: frozenset[bytes]
    minhash: Deduplication | None


class _WorkerState(NamedTuple):
    """What a process keeps open from piece to piece."""

    reader: sources.DocumentReader
    encoder: FastEncoder
    excluded_hashes: frozenset[bytes]
    minhash: Deduplication | None


def _tokenize_pieces(source: readers.DataSource, spec: TokenizeSpec, writer: _StoreWriter) -> Iterator[TokenizedPiece]:
    """Tokenise the remaining pieces in order, up to max_bytes.

    As many processes as there are cores work on them.
    """
    reader = sources.DocumentReader(source)
    limit = reader.entry.max_bytes
    if limit is not None and writer.stats.bytes_read >= limit:
        return
    with (
        TemporaryDirectory() as folder,
        write_backend_file(spec.tokenizer) as tokenizer_file,
        WorkerPool(min_characters=MIN_POOL_CHARACTERS) as workers,
    ):
        file = Path(folder, "work")  # each process reads it once: it is too large to send with each piece
        file.write_bytes(pickle.dumps(_WorkerInputs(source, tokenizer_file, spec.excluded_hashes, spec.minhash)))
        pending: list[readers.SourcePiece] = []
        pieces = islice(readers.read_pieces(source, reader.columns), writer.num_pieces, None)

        def feed_pieces() -> Iterator[readers.SourcePiece]:
            for piece in pieces:
                if limit is not None:
                    pending.append(piece)
                yield piece

        for stats, arrays in workers.map_chunks(_tokenize_piece, (str(file),), feed_pieces(), lambda piece: piece.size):
            if limit is not None and writer.stats.bytes_read + stats.bytes_read >= limit:
                # Once more, up to the document that reaches the limit
                yield _tokenize_piece(str(file), pending[0], limit - writer.stats.bytes_read)
                return
            del pending[:1]
            yield stats, arrays


@lru_cache(maxsize=1)
def _load_worker_state(file: str) -> _WorkerState:
    inputs: _WorkerInputs = pickle.loads(Path(file).read_bytes())
    encoder = FastEncoder(load_backend(inputs.tokenizer_file))
    return _WorkerState(sources.DocumentReader(inputs.source), encoder, inputs.excluded_hashes, inputs.minhash)


def _tokenize_piece(file: str, piece: readers.SourcePiece, limit: int | None = None) -> TokenizedPiece:
    """Tokenise a piece.

    Its arrays are the tokens, the records of the documents, and their signatures.
    """
    reader, encoder, excluded_hashes, minhash = _load_worker_state(file)
    stats = PieceStats()
    texts: list[str] = []
    locations: list[SourceLocation] = []
    hashes: list[bytes] = []
    rows = piece.read_rows(reader.source, reader.entry.text_column, partial(sources.record_long_row, stats.report))
    for document in sources.limit_bytes(reader.read_documents(rows, stats.report), limit):
        text_hash = hash_text(document.text)
        stats.bytes_read += len(document.text.encode())
        if text_hash in excluded_hashes or document.raw_hash in excluded_hashes:
            stats.num_held_out += 1
        else:
            texts.append(document.text)
            locations.append(document.location)
            hashes.append(text_hash)
    records = np.zeros(len(texts), DOCUMENT_DTYPE)
    records["size"] = [len(text.encode()) for text in texts]
    records["hash"] = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    try:
        tokens = encoder(texts)
    except UnencodableTextError as error:
        raise reader.source.error(f"{locations[error.index]}: {error}") from None
    except MemoryError as error:
        place = f"{reader.source.location}: {locations[0]} and the {len(texts) - 1} documents behind it"
        raise readers.explain_memory(place, error) from None
    records["length"] = [len(ids) for ids in tokens]
    stats.documents, stats.tokens, stats.bytes = len(texts), int(records["length"].sum()), int(records["size"].sum())
    arrays = [np.concatenate([np.zeros(0, np.uint32), *tokens]), records]
    return stats, arrays + ([deduplication.compute_signatures(texts, minhash)] if minhash else [])


class _StoreWriter:
    """Writes the files of a store.

    A later process can continue after the last `commit`.

    Args:
        folder: The folder of the files while they are not complete.
        has_signatures: Whether there are MinHash signatures.
        revision: A name for the content of the source; None: another process cannot continue.
    """

    def __init__(self, folder: Path, has_signatures: bool, revision: str | None) -> None:
        self.folder, self.revision = folder, revision
        self.names = ["tokens.bin", "documents.bin", *(["signatures.bin"] if has_signatures else [])]
        self.num_pieces, self.stats, self.sizes = 0, PieceStats(), [0] * len(self.names)
        self.files: list[IO[bytes]] = []
        self.committed_at = time.monotonic()

    def __enter__(self) -> _StoreWriter:
        if self.folder.is_symlink():
            raise CannotRun(f"{self.folder}: a link in the cache is not followed. Remove it")
        if not self._restore():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.num_pieces, self.stats, self.sizes = 0, PieceStats(), [0] * len(self.names)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, size in zip(self.names, self.sizes, strict=True):
            file = (self.folder / name).open("ab")
            self.files.append(file)
            file.truncate(size)
        return self

    def _restore(self) -> bool:
        """Restore the work of an interrupted process.

        Returns whether there is such work, complete and of the same revision.
        """
        try:
            state = read_json(self.folder / "state.json")
            self.num_pieces, self.sizes, revision = state["pieces"], state["sizes"], state["revision"]
            self.stats = PieceStats.from_state(state["made"])
            file_sizes = [(self.folder / name).stat().st_size for name in self.names]
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return (
            revision == self.revision
            and state["cut"] == [readers.PIECE_BYTES, readers.BATCH_ROWS]
            and all(size >= committed for size, committed in zip(file_sizes, self.sizes, strict=True))
        )

    def append(self, stats: PieceStats, arrays: list[npt.NDArray[Any]]) -> None:
        """Append a piece; commit every COMMIT_SECONDS."""
        for file, array in zip(self.files, arrays, strict=True):
            file.write(array.tobytes())
        for i, array in enumerate(arrays):
            self.sizes[i] += array.nbytes
        self.stats.merge(stats)
        self.num_pieces += 1
        if time.monotonic() > self.committed_at + COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write all that was appended to disk, and record its size."""
        if self.revision is None:
            return
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        state = {
            "revision": self.revision,
            "cut": [readers.PIECE_BYTES, readers.BATCH_ROWS],
            "pieces": self.num_pieces,
            "sizes": self.sizes,
            "made": self.stats.to_state(),
        }
        write_json(self.folder / "state.json", state)
        self.committed_at = time.monotonic()

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            with suppress(OSError):
                file.close()


@contextmanager
def _keep_work(source: readers.DataSource, writer: _StoreWriter) -> Iterator[None]:
    """Commit interrupted work; remove it when the source is wrong.

    Raises:
        CannotRun: The disk is full.
    """
    try:
        yield
        for file in writer.files:
            file.flush()
    except RecipeError:
        shutil.rmtree(writer.folder, ignore_errors=True)
        raise
    except BaseException as error:
        with suppress(OSError):
            writer.commit()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotRun(
                f"the disk is full: no space in {writer.folder.parent} for the tokens of {source.title}. "
                "Free space, then run the same command again: it continues there"
            ) from None
        raise


@contextmanager
def _pin_revision(source: readers.DataSource) -> Iterator[tuple[readers.DataSource, str | None]]:
    """Pin a source to one revision, and name it.

    So interrupted work continues with the same text.

    Files are identified by their content already. The name is None where the hub does not tell the commit of a revision:
    then interrupted work starts again.
    """
    if source.in_files:
        yield source, "files"
        return
    commit = None
    with suppress(Exception):  # no network: the dataset may be in the hub's cache
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(source.entry.path, revision=source.entry.revision, timeout=20).sha
    yield (replace(source, entry=replace(source.entry, revision=commit)) if commit else source), commit
