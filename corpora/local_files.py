"""Documents from files: .txt, .jsonl, .parquet and .arrow, plain or compressed, local or remote.

Every path goes through fsspec, so `s3://bucket/*.jsonl.zst` works where the driver is installed.
Files are read in sorted order and as a stream; a defect is reported with its file and line.
A data set written by `save_to_disk` is a directory of .arrow files and needs no special case.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

DOCUMENT_MODES = ("file", "paragraph", "line")
# A line with its line break, where an empty line is an empty document: WikiText's own form.
RAW_LINE = "raw_line"

_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    # a .zst file may be several frames in a row
    ".zst": lambda raw: io.BufferedReader(
        zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    ),
}
_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "heldout"),
}


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One input file.

    Attributes:
        url: what fsspec opens.
        name: the path below the directory or glob it was found by; '' for a file named directly.
        format: `text`, `jsonl`, `parquet` or `arrow`.
        compression: `.gz`, `.zst` or ''.
        identity: size and modification time, which change when the content does.
    """

    url: str
    name: str
    format: str
    compression: str
    identity: str


def find_files(path: str, *, key: str, default_format: str | None = None) -> list[TextFile]:
    """Returns the files that a path, directory, glob or fsspec URL names, sorted.

    In a directory or glob, hidden files and files of other types are left out.

    Args:
        path: what the user gave.
        key: the configuration key it was given under, for messages.
        default_format: the format of the files where no suffix tells one; None: an error.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the type is unknown, or the protocol has no driver.
    """
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{key}={path!r} cannot be opened: {error}") from error
    if filesystem.isfile(root):
        names = {root: ""}
    else:
        is_directory = filesystem.isdir(root)
        found = filesystem.find(root) if is_directory else filesystem.glob(root)
        base = root if is_directory else re.split(r"[^/]*[*?\[]", root)[0]
        names = {name: os.path.relpath(name, base) for name in sorted(found)}
        names = {name: short for name, short in names.items() if filesystem.isfile(name)}
    if not names:
        raise FileNotFoundError(
            f"{key}={path!r} does not exist or holds no file; allowed: a file, a directory or a "
            "glob, local or any fsspec URL"
        )
    files = [_text_file(filesystem, name, short) for name, short in names.items()]
    files = [file for file in files if not _is_hidden(file.name)]
    known = [file for file in files if file.format]
    if default_format is not None and not known:
        known = [dataclasses.replace(file, format=default_format) for file in files]
    if not known:
        raise ValueError(
            f"{key}={path!r} is of unknown type; allowed: {', '.join(_FORMATS)}, plain or "
            f"followed by {' or '.join(_DECOMPRESSORS)}"
        )
    return known


def _is_hidden(name: str) -> bool:
    # cache-*.arrow are leftovers of `Dataset.map` beside a saved data set
    return any(part.startswith((".", "cache-")) for part in name.split("/"))


def _text_file(filesystem: fsspec.AbstractFileSystem, path: str, name: str) -> TextFile:
    """Describes one file; its format is '' where the suffix tells nothing."""
    stem, compression = path, ""
    for suffix in _DECOMPRESSORS:
        if path.lower().endswith(suffix):
            stem, compression = path[: -len(suffix)], suffix
    info = filesystem.info(path)
    changed = next((info[key] for key in ("mtime", "ETag", "created") if key in info), None)
    return TextFile(
        url=filesystem.unstrip_protocol(path),
        name=name,
        format=_FORMATS.get(os.path.splitext(stem)[1].lower(), ""),
        compression=compression,
        identity=f"{info['size']} bytes, {changed}",
    )


def files_of_split(files: Sequence[TextFile], split: str, *, key: str) -> list[TextFile]:
    """Returns the files whose names say that they belong to a split, or all if no name says so.

    Raises:
        ValueError: the names mention other splits only.
    """
    by_split: dict[str, list[TextFile]] = {}
    for file in files:
        words = re.split(r"[^a-z0-9]+", file.name.lower())
        for name, spellings in _SPLIT_WORDS.items():
            if any(word in spellings for word in words):
                by_split.setdefault(name, []).append(file)
                break
    if by_split and split not in by_split:
        raise ValueError(
            f"{key}: no file is named as the {split} split ({', '.join(_SPLIT_WORDS[split])}), "
            f"only as {', '.join(by_split)}; name the files in data.train_path and data.valid_path"
        )
    return by_split.get(split, list(files))


def read_documents(
    files: Sequence[TextFile], document: str, text_column: str
) -> Iterator[dict[str, str]]:
    """Yields {text_column: document} for every document of the files, in order.

    Args:
        files: what `find_files` returned.
        document: for text files: `file`, `paragraph` (separated by blank lines), `line` (blank
            ones skipped), or `RAW_LINE`.
        text_column: name of the text's field in .jsonl, .parquet and .arrow files.

    Raises:
        ValueError: bytes that are not UTF-8, a broken line, or a missing field; the message
            names the file and the line.
    """
    for file in files:
        if file.format == "text":
            texts = _split_text(_lines(file), document)
        elif file.format == "jsonl":
            texts = _jsonl_texts(file, text_column)
        else:
            texts = _table_texts(file, text_column)
        for text in texts:
            yield {text_column: text}


@contextlib.contextmanager
def _open(file: TextFile) -> Iterator[IO[bytes]]:
    """Opens a file for reading what was in it before compression."""
    with fsspec.open(file.url, "rb") as raw:
        yield _DECOMPRESSORS[file.compression](raw) if file.compression else raw


def _lines(file: TextFile) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, each with `\\n` as its line break."""
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                text = _decode(line, file.url, number)
                yield text[:-2] + "\n" if text.endswith("\r\n") else text
    except ValueError:
        raise
    except Exception as error:  # each compression has exceptions of its own
        raise ValueError(f"{file.url} cannot be read: {error}") from error


def _decode(line: bytes, url: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{url}, line {number}: not UTF-8: byte {error.start + 1} of the line is "
            f"0x{line[error.start]:02x}; only UTF-8 text is allowed"
        ) from error


def _split_text(lines: Iterable[str], document: str) -> Iterator[str]:
    """Cuts a stream of lines into documents."""
    if document == "line":
        yield from (line.removesuffix("\n") for line in lines if line.strip())
    elif document == RAW_LINE:
        yield from (line if line != "\n" else "" for line in lines)
    else:
        gathered: list[str] = []
        for line in lines:
            if line.strip() or document == "file":
                gathered.append(line)
            elif gathered:
                yield "".join(gathered).removesuffix("\n")
                gathered = []
        if gathered:
            yield "".join(gathered) if document == "file" else "".join(gathered).removesuffix("\n")


def _jsonl_texts(file: TextFile, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.url}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or text_column not in record:
            fields = ", ".join(record) if isinstance(record, dict) else "none, it is no object"
            raise ValueError(
                f"{file.url}, line {number}: no field data.text_column={text_column!r}; its "
                f"fields: {fields}"
            )
        yield _checked(record[text_column], f"{file.url}, line {number}", text_column)


def _table_texts(file: TextFile, text_column: str) -> Iterator[str]:
    row = 0
    for batch in _table_batches(file, text_column):
        for text in batch.column(text_column).to_pylist():
            row += 1
            yield _checked(text, f"{file.url}, row {row}", text_column)


def _table_batches(file: TextFile, text_column: str) -> Iterator[pa.RecordBatch]:
    """Yields the tables of a .parquet or .arrow file that has the column."""
    try:
        with _open(file) as stream:
            if file.format == "parquet":
                # Parquet is read from its end, which a decompressor cannot do
                table = pq.ParquetFile(io.BytesIO(stream.read()) if file.compression else stream)
                _check_column(table.schema_arrow.names, file.url, text_column)
                yield from table.iter_batches(columns=[text_column])
            else:
                table = pa.ipc.open_stream(stream)
                _check_column(table.schema.names, file.url, text_column)
                yield from table
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.url} is no readable {file.format} file: {error}") from error


def _check_column(columns: list[str], url: str, text_column: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{url}: no column data.text_column={text_column!r}; its columns: {', '.join(columns)}"
        )


def _checked(text: Any, where: str, text_column: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: data.text_column={text_column!r} must hold text, not {text!r:.80}"
        )
    return text
