"""Packed rows on disk: built once, named by all that shaped them, read as a memory map.

An entry is a directory with `ids.int32` (row-major, little-endian), `lengths.int32` and
`meta.json`. It appears under its name only when complete (temporary directory, then rename),
and a file lock lets one process build while the others wait.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from corpora.packing import Rows

logger = logging.getLogger(__name__)

# Raise this when the meaning or the layout of an entry changes.
_FORMAT_VERSION = 1
# Up to this size an entry's content is hashed on every opening, which takes about a second.
_VERIFIED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedRows:
    """An entry: memory-mapped `ids` (rows, N) and `lengths` (rows,), both int32.

    `sha256` is the hash of `ids` as row-major little-endian int32.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sha256: str


class _CorruptEntry(Exception):
    """An entry whose files do not agree with its description."""


def get_or_build(
    cache_dir: str, label: str, key: dict[str, Any], build: Callable[[], Iterable[Rows]]
) -> CachedRows:
    """Opens the entry of a key, and builds it first where it is missing or corrupt.

    Args:
        cache_dir: the cache's root, created on demand.
        label: readable beginning of the entry's name.
        key: JSON-able; everything that shapes the rows.
        build: called to make them, in order.

    Raises:
        OSError: the cache cannot be written; nothing half-written is left.
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
        with new_directory(entry) as folder:
            summary = _write(folder, key, build())
    logger.info("%s: %s", label, summary)
    return _open(entry, key)


def entry_path(cache_dir: str, label: str, key: dict[str, Any]) -> Path:
    """Returns where the entry of a key is kept; the name holds a hash of the whole key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir, re.sub(r"[^\w.+-]+", "_", label) + "-" + digest[:20])


@contextlib.contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Holds the lock of an entry, which need not exist yet; others wait for it.

    If the file system refuses (full disk, no permission, ...), the error says what to change.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{entry}.lock"):
            yield
    except OSError as error:
        if error.errno is None:  # a message about the data, not the file system's
            raise
        raise OSError(
            error.errno,
            f"data.cache_dir: cannot write {entry.parent} ({error.strerror}); it must lie in a "
            "writable directory with enough free space. Nothing half-written was left there",
        ) from error


@contextlib.contextmanager
def new_directory(entry: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `entry` on success and vanishes on failure.

    The caller holds the lock of the entry, so leftovers of a killed process can be removed.
    """
    for leftover in entry.parent.glob(f"{entry.name}.tmp-*"):
        shutil.rmtree(leftover)
    folder = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
    try:
        yield folder
        folder.rename(entry)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(folder: Path, key: dict[str, Any], batches: Iterable[Rows]) -> str:
    """Writes the rows and then the description without which an entry is not readable.

    Returns:
        One line for the log: documents, tokens, rows and hash.
    """
    digests = {"ids": hashlib.sha256(), "lengths": hashlib.sha256()}
    documents = tokens = num_rows = 0
    with open(folder / "ids.int32", "wb") as ids, open(folder / "lengths.int32", "wb") as lengths:
        for rows in batches:
            for name, file, values in (("ids", ids, rows.ids), ("lengths", lengths, rows.lengths)):
                content = values.astype("<i4").tobytes()
                digests[name].update(content)
                file.write(content)
            documents += rows.num_documents
            tokens += rows.num_tokens
            num_rows += len(rows.ids)
    sha256 = {name: digest.hexdigest() for name, digest in digests.items()}
    meta = {"key": key, "rows": num_rows, "sha256": sha256}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return (
        f"{documents:,} documents, {tokens:,} tokens, {num_rows:,} rows of {key['length']:,}, "
        f"sha256 {sha256['ids']}"
    )


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
        num_rows, expected = meta["rows"], meta["sha256"]
        ids = _map(entry / "ids.int32", (num_rows, key["length"]), sha256=expected["ids"])
        lengths = _map(entry / "lengths.int32", (num_rows,), sha256=expected["lengths"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _CorruptEntry(error) from error
    return CachedRows(ids=ids, lengths=lengths, sha256=expected["ids"])


def _map(path: Path, shape: tuple[int, ...], *, sha256: str) -> np.ndarray:
    num_bytes = math.prod(shape) * 4
    if path.stat().st_size != num_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {num_bytes}")
    if num_bytes == 0:  # an empty file cannot be mapped
        return np.empty(shape, dtype="<i4")
    values = np.memmap(path, dtype="<i4", mode="r", shape=shape)
    if num_bytes <= _VERIFIED_BYTES and hashlib.sha256(values).hexdigest() != sha256:
        raise ValueError(f"{path.name} differs from its recorded hash")
    return values
