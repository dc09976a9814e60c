"""Lines of text: the one reader of every text and JSON Lines file of the project.

A line ends at `\\n` alone: U+2028, U+0085 and form feeds are characters of a text. A byte-order
mark at the beginning is dropped, and so is the `\\r` with which Windows ends lines. Any place that
fsspec reaches will do, and a name ending in .gz or .zst says how the file is compressed.
"""

import contextlib
import gzip
import io
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

import fsspec
import zstandard

DECOMPRESSORS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    # a .zst file may be several frames in a row
    ".zst": lambda raw: io.BufferedReader(
        zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    ),
}


def compression_of(path: str) -> str:
    """The suffix that says how a file is compressed, or ''."""
    return next((suffix for suffix in DECOMPRESSORS if path.lower().endswith(suffix)), "")


@contextlib.contextmanager
def open_decompressed(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading what was in it before compression."""
    compression = compression_of(path)
    with fsspec.open(path, "rb") as raw:
        yield DECOMPRESSORS[compression](raw) if compression else raw


def read_lines(path: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, each with `\\n` as its line break; maybe not the last one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        with open_decompressed(path) as stream:
            for number, line in enumerate(stream, start=1):
                text = _decode(line, path, number)
                yield text[:-2] + "\n" if text.endswith("\r\n") else text
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # each compression has exceptions of its own
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON Lines file, each behind its place for messages.

    Blank lines are passed over.

    Raises:
        FileNotFoundError, ValueError: as `read_lines`; a line that is no JSON object.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: no JSON object but {line.strip():.60}")
        yield where, record


def without_surrogates(text: str) -> str:
    """The text as UTF-8 can hold it: halves of a pair are joined, a lone one becomes U+FFFD.

    JSON spells such halves `\\ud83d`, text cut in the middle of an emoji has them, and Python
    stands them for bytes of the command line that are not UTF-8. No tokenizer takes them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def checked_text(value: object, where: str) -> str:
    """The value, if it is text; halves of surrogate pairs are mended.

    Raises:
        ValueError: names the place of what is no text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} must hold text, not {value!r:.80}")
    return without_surrogates(value)


def _decode(line: bytes, path: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8: byte {error.start + 1} of the line is "
            f"0x{line[error.start]:02x}; only UTF-8 text is allowed"
        ) from error
