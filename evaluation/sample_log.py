"""Samples on disk: `samples.csv` with the original's columns, `samples.jsonl` with everything."""

import contextlib
import csv
import datetime
import errno
import fcntl
import io
import math
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from corpora.lines import read_json_lines
from utils import json_text

# The original's columns and, at the end, the count of forward passes that the paper reports.
ORIGINAL_COLUMNS = ("gen_ppl", "gen_nfes", "gen_entropy", "gen_lengths", "samples", "seed")
COLUMNS = (*ORIGINAL_COLUMNS, "gen_nfes_paper")
_TYPES = dict.fromkeys(COLUMNS, int) | {"gen_ppl": float, "gen_entropy": float, "samples": str}
# A number, maybe as Python prints a list or a tensor of it: the original wrote such cells too.
_NUMBER = re.compile(
    r"(?:\[|tensor\()*\s*([-+]?(?:[\d.]+(?:e[-+]?\d+)?|inf|nan))(?:, device='[\w:]*')?\s*[\])]*",
    re.IGNORECASE,
)
# What a file system without locks, such as some of clusters, answers.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One sample. None: not measured, or of an old file that has no such column."""

    samples: str  # the text
    gen_nfes: int | None  # forward passes of the network, each one counted
    gen_lengths: int | None  # tokens
    seed: int | None
    gen_ppl: float | None = None  # None where scoring was skipped or no token counts
    gen_entropy: float | None = None  # nats
    gen_nfes_paper: int | None = None  # forward passes as the paper counts them
    # Further entries of the JSON line: rank, batch, prompt, checkpoint, accepted, config hash, ...
    extra: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, str | int | float | None]:
        """The columns in their order; NaN, which JSON does not have, becomes None."""
        values = {name: getattr(self, name) for name in COLUMNS}
        cells = {k: None if v is None else _TYPES[k](v) for k, v in values.items()}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in cells.items()}


def make_logdir(logdir: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Makes the directory if need be; returns its file system and its path there.

    Raises:
        OSError: it cannot be made, or is a file.
    """
    fs, root = fsspec.core.url_to_fs(logdir)
    with _naming(logdir):
        fs.makedirs(root, exist_ok=True)
    return fs, root


def append_samples(logdir: str, records: Sequence[SampleRecord]) -> str:
    """Adds one row per record to `samples.csv` and one line to `samples.jsonl` in `logdir`.

    Call it after every batch: what it returned from stays, whatever happens to the run. Any
    number of processes may write to one directory; each file is locked meanwhile, its header is
    written once, and a row that a killed process left incomplete is removed. In a CSV of the
    original, which has fewer columns and no header, rows take its columns.

    Where files cannot be locked or appended to (s3:// and the like), each call writes a pair of
    files of its own, `samples-<time>-<random>.csv` and `.jsonl`; the readers here take those too.

    Returns:
        The path of the CSV file.

    Raises:
        OSError: names the file that cannot be written.
        ValueError: the CSV file has other columns, or `extra` names one of ours.
    """
    lines = "".join(_json_line(record) for record in records)
    fs, root = make_logdir(logdir)
    if isinstance(fs, LocalFileSystem):
        csv_path, jsonl_path = (
            os.path.join(root, "samples.csv"),
            os.path.join(root, "samples.jsonl"),
        )
        with contextlib.suppress(_NoLocksError):
            with _naming(jsonl_path), _locked(jsonl_path) as file:
                _append(file, lines, end=file.read().rfind(b"\n") + 1)
            with _naming(csv_path), _locked(csv_path) as file:
                _append_rows(file, records, path=csv_path)
            return csv_path
    now = datetime.datetime.now(datetime.UTC)
    stem = f"{logdir.rstrip('/')}/samples-{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    for path, text in (
        (f"{stem}.jsonl", lines),
        (f"{stem}.csv", _csv_text(records, columns=COLUMNS, has_header=True)),
    ):
        with _naming(path), fsspec.open(path, "wb") as file:
            file.write(_bytes(text))
    return f"{stem}.csv"


def _append_rows(file: io.FileIO, records: Sequence[SampleRecord], *, path: str) -> None:
    content = file.read()
    end = _complete_length(content)
    columns: Sequence[str] = COLUMNS
    if end:
        text = io.StringIO(content[:end].decode(errors="replace"), newline="")
        with _long_fields():
            columns = _columns_of(next(csv.reader(text)), where=f"{path}, line 1")[0]
    _append(file, _csv_text(records, columns=columns, has_header=not end), end=end)


def _append(file: io.FileIO, text: str, *, end: int) -> None:
    """Writes text from byte `end` on, or nothing where the disk is full."""
    file.truncate(end)
    data, written = memoryview(_bytes(text)), 0
    try:
        while written < len(data):
            written += file.write(data[written:])  # at the end: O_APPEND
    except OSError:
        file.truncate(end)
        raise


def _complete_length(content: bytes) -> int:
    """Bytes up to the end of the last complete CSV row: a newline outside of quotes."""
    end = offset = 0
    for i, part in enumerate(content.split(b'"')):
        if i % 2 == 0 and b"\n" in part:  # a doubled quote is an empty part in between
            end = offset + part.rfind(b"\n") + 1
        offset += len(part) + 1
    return end


class _NoLocksError(Exception):
    """The file system cannot lock."""


@contextlib.contextmanager
def _locked(path: str) -> Iterator[io.FileIO]:
    """The file, made if need be, unbuffered, at its beginning, and nobody else's until closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    with io.FileIO(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise _NoLocksError from error
            raise
        yield file


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def _bytes(text: str) -> bytes:
    # A lone surrogate, which UTF-8 does not have, becomes \ud800: JSON reads that back.
    return text.encode(errors="backslashreplace")


def _json_line(record: SampleRecord) -> str:
    if clash := sorted(record.extra.keys() & _TYPES.keys()):
        raise ValueError(f"extra may not have {clash}: these are columns")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entries = record.values() | {"time": now} | dict(record.extra)
    return json_text(entries, ensure_ascii=False, default=str) + "\n"


def _csv_text(records: Sequence[SampleRecord], *, columns: Sequence[str], has_header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    if has_header:
        writer.writeheader()
    writer.writerows(record.values() for record in records)
    return text.getvalue()


def find_sample_files(path: str | Path) -> list[Path]:
    """The sample files that a file or directory stands for.

    A directory stands for its `.csv` files, and for the `.jsonl` files with no CSV of the same
    name beside them: the two hold the same samples. Files without content are passed over.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    tables, lines = (
        [file for file in sorted(path.glob(pattern)) if file.stat().st_size]
        for pattern in ("*.csv", "*.jsonl")
    )
    stems = {table.stem for table in tables}
    files = tables + [file for file in lines if file.stem not in stems]
    if not files:
        raise FileNotFoundError(f"{path}: no .csv or .jsonl file of samples in this directory")
    return files


def read_samples(path: str | Path) -> list[SampleRecord]:
    """The samples of a CSV file, ours or the original's, or of a `.jsonl` file.

    Raises:
        ValueError: names file and line of a row that is broken, or says that there is none.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        records = list(_read_jsonl(path))
    else:  # maybe saved again by a program that puts a byte-order mark in front
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            records = list(_read_csv(file, str(path)))
    if not records:
        raise ValueError(f"{path}: no samples in this file")
    return records


def _read_jsonl(path: Path) -> Iterator[SampleRecord]:
    for where, entries in read_json_lines(str(path)):
        if missing := set(ORIGINAL_COLUMNS) - set(entries):
            raise ValueError(f"{where}: a sample needs {sorted(missing)}")
        cells = {k: "" if entries.get(k) is None else str(entries[k]) for k in COLUMNS}
        extra = {k: v for k, v in entries.items() if k not in _TYPES}
        yield _record(cells, where=where, extra=extra)


def _read_csv(file: io.TextIOBase, path: str) -> Iterator[SampleRecord]:
    with _long_fields():
        reader = csv.reader(file, strict=True)
        columns: Sequence[str] = ()
        line = 1  # of the row's beginning: texts have newlines
        try:
            for row in reader:
                where = f"{path}, line {line}"
                is_header = False
                if not columns:
                    columns, is_header = _columns_of(row, where=where)
                if row and not is_header:  # [] is an empty line
                    if len(row) != len(columns):
                        raise ValueError(
                            f"{where}: {len(row)} cells instead of {len(columns)} "
                            f"({', '.join(columns)})"
                        )
                    yield _record(dict(zip(columns, row, strict=True)), where=where)
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: not a row of CSV ({error})") from error


def _columns_of(row: Sequence[str], *, where: str) -> tuple[Sequence[str], bool]:
    """The columns of a file by its first row, and whether that row is a header."""
    if set(ORIGINAL_COLUMNS) <= set(row):
        return row, True
    for columns in (ORIGINAL_COLUMNS, COLUMNS):
        if len(row) == len(columns):  # the original wrote no header
            return columns, False
    raise ValueError(f"{where}: not a table of samples; its columns are {', '.join(COLUMNS)}")


def _record(
    cells: Mapping[str, str], *, where: str, extra: Mapping[str, Any] | None = None
) -> SampleRecord:
    values: dict[str, Any] = {"samples": cells["samples"]}
    for name in COLUMNS:
        cell = cells.get(name, "").strip()
        if name == "samples" or not cell:
            continue
        match = _NUMBER.fullmatch(cell)
        number = match[1] if match else cell
        try:
            if _TYPES[name] is int and number.lstrip("-").isdecimal():
                values[name] = int(number)  # a seed may be larger than a float is exact
            elif not math.isnan(float(number)):
                values[name] = _TYPES[name](float(number))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {name} is {cell[:40]!r}, which is no number") from error
    return SampleRecord(**dict.fromkeys(COLUMNS) | values, extra=extra or {})


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Python's limit of 131,072 characters per cell is less than a text of as many tokens."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
