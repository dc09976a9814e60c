"""Packed rows on disk: built once, named by all that shaped them, read as a memory map.

An entry is a directory with `ids.uint16` (`ids.int32` for large vocabularies; row-major,
little-endian), `lengths.int32` and `meta.json`, which says how much of them counts. It is built
under the name `....partial`: what is behind the rows that `meta.json` counts is dropped when a
build goes on after its process was killed. Complete, it is renamed. A file lock lets one process
build while the others wait.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpora.packing import Rows
from utils import file_lock, get_logger, lock_holder

logger = logging.getLogger(__name__)
first_process_logger = get_logger(f"{__name__}.waiting")

# Raise this when the meaning or the layout of an entry changes.
_FORMAT_VERSION = 2
# Up to this size an entry's content is hashed on every opening, which takes about a second.
_VERIFIED_BYTES = 1 << 30
# How much work a killed build may lose, in seconds.
_COMMIT_EVERY = 10
# Whoever waits for another process says so after so many seconds, and again and again.
_FIRST_NOTICE, _NEXT_NOTICES = 5, 300
# Half-built entries that nobody has gone on with for so many days are removed.
_STALE_DAYS = 30
# Numbers that are hashed at once.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedRows:
    """An entry: memory-mapped `ids` (rows, N), uint16 or int32, and `lengths` (rows,) int32.

    `sha256` is the hash of `ids` as row-major little-endian int32, whatever their type.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sha256: str


class _CorruptEntry(Exception):
    """An entry whose files do not agree with its description."""


def get_or_build(
    cache_dir: str, label: str, key: dict[str, Any], build: Callable[[int], Iterable[Rows]]
) -> CachedRows:
    """Opens the entry of a key, and builds it first where it is missing or corrupt.

    A build that was killed or failed goes on where it was last committed.

    Args:
        cache_dir: the cache's root, created on demand.
        label: readable beginning of the entry's name.
        key: JSON-able; everything that shapes the rows. `length` is that of a row, `vocab_size`
            is larger than any id.
        build: called with a number to make the batches of rows that follow the first so many;
            the same ones in the same order each time.

    Raises:
        OSError: the cache cannot be written; what has been committed is kept.
    """
    key = {"format": _FORMAT_VERSION} | key
    entry = entry_path(cache_dir, label, key)
    with contextlib.suppress(FileNotFoundError, _CorruptEntry):
        return _open(entry, key)
    with locked(entry):
        # Another process may have built it while this one waited.
        try:
            return _open(entry, key)
        except FileNotFoundError:
            pass
        except _CorruptEntry as error:
            logger.warning("The cache entry %s is corrupt (%s): building it again.", entry, error)
            shutil.rmtree(entry)
        folder = entry.with_name(f"{entry.name}.partial")
        _remove_stale(entry.parent, but=folder)
        summary = _build(folder, label, key, build)
        with _naming_the_cache(entry.parent):
            folder.rename(entry)
    logger.info("%s: %s", label, summary)
    return _open(entry, key)


def entry_path(cache_dir: str, label: str, key: dict[str, Any]) -> Path:
    """Returns where the entry of a key is kept; the name holds a hash of the whole key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir, re.sub(r"[^\w.+-]+", "_", label) + "-" + digest[:20])


@contextlib.contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Holds the lock of an entry, which need not exist yet; others wait for it, and say so.

    Raises:
        OSError: the cache's directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _naming_the_cache(entry.parent), _saying_who_is_waited_for(entry):
            entry.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(_lock_path(entry)))
        yield


def _lock_path(entry: Path) -> str:
    return f"{entry}.lock"


@contextlib.contextmanager
def _saying_who_is_waited_for(entry: Path) -> Iterator[None]:
    """Writes to the log, while its body goes on, which process holds the lock of an entry."""
    is_over = threading.Event()

    def speak() -> None:
        pause = _FIRST_NOTICE
        while not is_over.wait(pause):
            holder = lock_holder(_lock_path(entry))
            first_process_logger.info("Waiting for %s, which makes %s", holder, entry)
            pause = _NEXT_NOTICES

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


@contextlib.contextmanager
def _naming_the_cache(folder: Path) -> Iterator[None]:
    """If the file system refuses (full disk, no permission, ...), says what to change."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"data.cache_dir: cannot write {folder} ({error.strerror}); it must lie in a writable "
            "directory with enough free space. What is finished there is kept: the same command "
            "goes on with it",
        ) from error


@contextlib.contextmanager
def new_directory(entry: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `entry` on success and vanishes on failure.

    The caller holds the lock of the entry, so leftovers of a killed process can be removed.

    Raises:
        OSError: the cache's directory cannot be written.
    """
    with _naming_the_cache(entry.parent):
        for leftover in entry.parent.glob(f"{entry.name}.tmp-*"):
            shutil.rmtree(leftover)
        folder = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
        try:
            yield folder
            folder.rename(entry)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _remove_stale(cache_dir: Path, *, but: Path) -> None:
    """Removes half-built entries that were given up: their text has changed since, say."""
    for folder in {*cache_dir.glob("*.partial"), *cache_dir.glob("*.tmp-*")} - {but}:
        with contextlib.suppress(OSError):  # another process may be doing the same
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _STALE_DAYS * 86_400:
                shutil.rmtree(folder)
                logger.info("Removed %s: untouched for %d days", folder, _STALE_DAYS)


# --- building ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Written:
    """How much of an entry is written, in batches, documents, tokens and rows; never changed.

    The hashes are those of all ids and lengths as int32.
    """

    batches: int = 0
    documents: int = 0
    tokens: int = 0
    rows: int = 0
    ids: Any = dataclasses.field(default_factory=hashlib.sha256)
    lengths: Any = dataclasses.field(default_factory=hashlib.sha256)

    def plus(self, batch: Rows) -> "_Written":
        ids, lengths = self.ids.copy(), self.lengths.copy()
        ids.update(batch.ids.astype("<i4").tobytes())
        lengths.update(batch.lengths.astype("<i4").tobytes())
        return _Written(
            batches=self.batches + 1,
            documents=self.documents + batch.num_documents,
            tokens=self.tokens + batch.num_tokens,
            rows=self.rows + len(batch.ids),
            ids=ids,
            lengths=lengths,
        )

    def meta(self, key: dict[str, Any]) -> dict[str, Any]:
        """What `meta.json` says."""
        sha256 = {"ids": self.ids.hexdigest(), "lengths": self.lengths.hexdigest()}
        counts = {name: getattr(self, name) for name in ("batches", "documents", "tokens", "rows")}
        return {"key": key, **counts, "sha256": sha256}


class _Builder:
    """Appends rows to a half-built entry (a context manager).

    Leaving it commits, whatever the reason; a full disk leaves what was committed before.
    """

    def __init__(self, folder: Path, key: dict[str, Any]):
        self.written = _take_up(folder, key)
        self._folder, self._key, self._dtype = folder, key, _id_type(key)
        self._committed_at = time.monotonic()

    def __enter__(self) -> "_Builder":
        with _naming_the_cache(self._folder.parent):
            self._folder.mkdir(exist_ok=True)
            names = _file_names(self._key)
            self._ids, self._lengths = (open(self._folder / name, "ab") for name in names)
        return self

    def append(self, batch: Rows) -> None:
        """Writes a batch, and commits when it is time."""
        largest = batch.ids.max(initial=0)
        if largest >= self._key["vocab_size"]:
            raise ValueError(
                f"the tokenizer gave the id {largest}, but its vocabulary ends at "
                f"{self._key['vocab_size'] - 1}"
            )
        with _naming_the_cache(self._folder.parent):
            self._ids.write(batch.ids.astype(self._dtype).tobytes())
            self._lengths.write(batch.lengths.astype("<i4").tobytes())
            # Only now, and at one blow: a signal may end this function anywhere.
            self.written = self.written.plus(batch)
            if time.monotonic() - self._committed_at >= _COMMIT_EVERY:
                self._commit()

    def _commit(self) -> None:
        for file in (self._ids, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        partial = self._folder / "meta.json.partial"
        with open(partial, "w") as file:
            json.dump(self.written.meta(self._key), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self._folder / "meta.json")
        self._committed_at = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with _naming_the_cache(self._folder.parent):
                self._commit()
        except OSError:
            if kind is None:  # else that error is the one to tell
                raise
        finally:
            for file in (self._ids, self._lengths):
                with contextlib.suppress(OSError):  # a full disk, which has been told
                    file.close()
            if kind is not None and not self.written.batches:
                shutil.rmtree(self._folder, ignore_errors=True)  # nothing to go on with


def _build(
    folder: Path, label: str, key: dict[str, Any], build: Callable[[int], Iterable[Rows]]
) -> str:
    """Writes what is missing in a half-built entry.

    Returns:
        One line for the log: documents, tokens, rows and hash.
    """
    with _Builder(folder, key) as builder:
        kept = builder.written
        if kept.batches:
            logger.info(
                "%s: going on after %s documents: %s rows are kept from a start before",
                label,
                f"{kept.documents:,}",
                f"{kept.rows:,}",
            )
        for batch in build(kept.batches):
            builder.append(batch)
    written = builder.written
    return (
        f"{written.documents:,} documents, {written.tokens:,} tokens, {written.rows:,} rows of "
        f"{key['length']:,}, sha256 {written.ids.hexdigest()}"
    )


def _take_up(folder: Path, key: dict[str, Any]) -> _Written:
    """Cuts a half-built entry to what was committed; one that is unusable is removed."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = {name: meta[name] for name in ("batches", "documents", "tokens", "rows")}
        hashes = {}
        for name, file_name, (shape, dtype) in zip(
            ("ids", "lengths"), _file_names(key), _arrays(key, meta["rows"]), strict=True
        ):
            path = folder / file_name
            os.truncate(path, _size(path, shape, dtype))
            hashes[name] = _hash(_map(path, shape, dtype))
        written = _Written(**counts, **hashes)
        if json.dumps(written.meta(key)) != json.dumps(meta):  # tuples have become lists
            raise ValueError("its content differs from what was committed")
        return written
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("%s cannot be gone on with (%s): starting anew", folder, error)
        with _naming_the_cache(folder.parent):
            if folder.exists():
                shutil.rmtree(folder)
        return _Written()


# --- files ---------------------------------------------------------------------------------------


def _id_type(key: dict[str, Any]) -> np.dtype:
    """Half the space where two bytes hold every id."""
    return np.dtype("<u2" if key["vocab_size"] <= 1 << 16 else "<i4")


def _file_names(key: dict[str, Any]) -> tuple[str, str]:
    return f"ids.{_id_type(key).name}", "lengths.int32"


def _arrays(key: dict[str, Any], rows: int) -> tuple[tuple[tuple[int, ...], np.dtype], ...]:
    """Shape and type of what the two files hold."""
    return ((rows, key["length"]), _id_type(key)), ((rows,), np.dtype("<i4"))


def _open(entry: Path, key: dict[str, Any]) -> CachedRows:
    """Opens an entry.

    Raises:
        FileNotFoundError: there is none.
        _CorruptEntry: its files are missing, cut short or changed.
    """
    if not entry.exists():
        raise FileNotFoundError(entry)
    try:
        meta = json.loads((entry / "meta.json").read_text())
        values = []
        for name, file_name, (shape, dtype) in zip(
            ("ids", "lengths"), _file_names(key), _arrays(key, meta["rows"]), strict=True
        ):
            path = entry / file_name
            if path.stat().st_size != _size(path, shape, dtype):
                raise ValueError(f"{file_name} is longer than {meta['rows']} rows")
            values.append(_map(path, shape, dtype))
            is_small = values[-1].nbytes <= _VERIFIED_BYTES
            if is_small and _hash(values[-1]).hexdigest() != meta["sha256"][name]:
                raise ValueError(f"{file_name} differs from its recorded hash")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _CorruptEntry(error) from error
    return CachedRows(ids=values[0], lengths=values[1], sha256=meta["sha256"]["ids"])


def _size(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns the bytes that an array takes; a file that has fewer is a ValueError."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if path.stat().st_size < num_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {num_bytes}")
    return num_bytes


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if math.prod(shape) == 0:  # an empty file cannot be mapped
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _hash(values: np.ndarray) -> Any:
    """Returns the running SHA-256 of an array as little-endian int32, whatever its type."""
    digest, flat = hashlib.sha256(), values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        digest.update(flat[start : start + _CHUNK].astype("<i4").tobytes())
    return digest
