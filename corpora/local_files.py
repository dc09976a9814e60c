"""Documents from files: .txt, .jsonl, .parquet and .arrow, plain or compressed, local or remote.

Every path goes through fsspec, so `s3://bucket/*.jsonl.zst` works where the driver is installed.
Files are read in sorted order and as a stream; a defect is reported with its file and line.
A data set written by `save_to_disk` is a directory of .arrow files and needs no special case.
"""

import dataclasses
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from corpora.lines import (
    DECOMPRESSORS,
    checked_text,
    compression_of,
    open_decompressed,
    read_json_lines,
    read_lines,
)

DOCUMENT_MODES = ("file", "paragraph", "line")
# A line with its line break, where an empty line is an empty document: WikiText's own form.
RAW_LINE = "raw_line"

_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "heldout"),
}
# How Arrow's file format begins. Its stream format begins with a length.
_ARROW_FILE = b"ARROW1"


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One input file.

    Attributes:
        url: what fsspec opens.
        name: the path below the directory or glob it was found by; '' for a file named directly.
        format: `text`, `jsonl`, `parquet` or `arrow`.
        identity: size and modification time, which change when the content does.
    """

    url: str
    name: str
    format: str
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
            f"followed by {' or '.join(DECOMPRESSORS)}"
        )
    return known


def _is_hidden(name: str) -> bool:
    # cache-*.arrow are leftovers of `Dataset.map` beside a saved data set
    return any(part.startswith((".", "cache-")) for part in name.split("/"))


def _text_file(filesystem: fsspec.AbstractFileSystem, path: str, name: str) -> TextFile:
    """Describes one file; its format is '' where the suffix tells nothing."""
    stem = path.lower().removesuffix(compression_of(path))
    info = filesystem.info(path)
    changed = next((info[key] for key in ("mtime", "ETag", "created") if key in info), None)
    return TextFile(
        url=filesystem.unstrip_protocol(path),
        name=name,
        format=_FORMATS.get(os.path.splitext(stem)[1], ""),
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
            texts = _split_text(read_lines(file.url), document)
        elif file.format == "jsonl":
            texts = _jsonl_texts(file, text_column)
        else:
            texts = _table_texts(file, text_column)
        for text in texts:
            yield {text_column: text}


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
    for where, record in read_json_lines(file.url):
        if text_column not in record:
            raise ValueError(
                f"{where}: no field data.text_column={text_column!r}; its fields: "
                f"{', '.join(record)}"
            )
        yield checked_text(record[text_column], f"{where}: data.text_column={text_column!r}")


def _table_texts(file: TextFile, text_column: str) -> Iterator[str]:
    row = 0
    for column in _table_columns(file, text_column):
        for cell in column:
            row += 1
            where = f"{file.url}, row {row}: data.text_column={text_column!r}"
            try:
                text = cell.as_py()
            except UnicodeDecodeError as error:  # Arrow does not look at what it is given
                raise ValueError(f"{where}: not UTF-8: {error}") from error
            yield checked_text(text, where)


def _table_columns(file: TextFile, text_column: str) -> Iterator[pa.Array]:
    """Yields the column of a .parquet or .arrow file, a part of its rows at a time."""
    for batch in _table_batches(file, text_column):
        column = batch.column(text_column)
        # Arrow believes where a file says that texts begin and end, and may end the process there.
        as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
        try:
            column.view(as_bytes.get(column.type, column.type)).validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"{file.url} is no readable {file.format} file: {error}") from error
        yield column


def _table_batches(file: TextFile, text_column: str) -> Iterator[pa.RecordBatch]:
    """Yields the tables of a .parquet or .arrow file that has the column."""
    try:
        with open_decompressed(file.url) as stream:
            is_arrow_file = file.format == "arrow" and _is_arrow_file(file)
            if compression_of(file.url) and (is_arrow_file or file.format == "parquet"):
                # These are read from their end, which a decompressor cannot do.
                stream = io.BytesIO(stream.read())
            if file.format == "parquet":
                table = pq.ParquetFile(stream)
                _check_column(table.schema_arrow.names, file.url, text_column)
                yield from table.iter_batches(columns=[text_column])
            elif is_arrow_file:
                table = pa.ipc.open_file(stream)
                _check_column(table.schema.names, file.url, text_column)
                yield from map(table.get_batch, range(table.num_record_batches))
            else:
                table = pa.ipc.open_stream(stream)
                _check_column(table.schema.names, file.url, text_column)
                yield from table
    except _NoColumnError:
        raise
    except Exception as error:  # each compression has exceptions of its own
        raise ValueError(f"{file.url} is no readable {file.format} file: {error}") from error


def _is_arrow_file(file: TextFile) -> bool:
    """Whether it is Arrow's file format (polars, R, Feather 2), not its stream format."""
    with open_decompressed(file.url) as stream:
        return stream.read(len(_ARROW_FILE)) == _ARROW_FILE


class _NoColumnError(ValueError):
    """A table lacks the column of the text, or has several of that name."""


def _check_column(columns: list[str], url: str, text_column: str) -> None:
    if columns.count(text_column) != 1:
        raise _NoColumnError(
            f"{url}: no single column data.text_column={text_column!r}; its columns: "
            f"{', '.join(columns)}"
        )
