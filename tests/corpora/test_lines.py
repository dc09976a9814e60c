"""The one reader of text and JSON Lines: where lines end, what is dropped, what is refused."""

import gzip
from pathlib import Path

import pytest
import zstandard

from corpora.lines import checked_text, read_json_lines, read_lines, without_surrogates

# What `str.splitlines` takes for the end of a line, and no other program does.
STRANGE = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh"


def test_lines_end_at_newlines_alone(tmp_path: Path):
    """Prompts were cut at a form feed, and JSON in two at U+2028."""
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeffone\r\n\r\n{STRANGE}\n last\ufeff".encode())
    assert list(read_lines(str(path))) == ["one\n", "\n", f"{STRANGE}\n", " last\ufeff"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".ZST", zstandard.compress)],
)
def test_json_lines(tmp_path: Path, suffix: str, compress):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(f'\ufeff{{"a": "{STRANGE[:5]}"}}\r\n\n{{"a": 1}}\n'.encode()))
    (first, one), (third, three) = read_json_lines(str(path))
    assert (one, three) == ({"a": STRANGE[:5]}, {"a": 1})
    assert (first, third) == (f"{path}, line 1", f"{path}, line 3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a"', r"a.jsonl, line 2: not JSON"),
        (b"\xff\xfe{\x00", r"a.jsonl, line 1: not UTF-8: byte 1 of the line is 0xff"),
        (b'"text"', r'a.jsonl, line 1: no JSON object but "text"'),
        (b'{"a": ' + b"9" * 5_000 + b"}", r"a.jsonl, line 1: not JSON: Exceeds the limit"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(str(path)))


def test_no_file_and_a_directory(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        list(read_lines(str(tmp_path / "none")))
    with pytest.raises(ValueError, match="cannot be read: .*directory"):
        list(read_lines(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain α😀", "plain α😀"),
        ("a\ud83d b", "a\ufffd b"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\udcff", "\ufffd"),  # how Python stands in for the byte 0xff of a command line
    ],
)
def test_lone_surrogates(text: str, expected: str):
    assert without_surrogates(text) == expected


@pytest.mark.parametrize("value", [None, 7, b"bytes", ["text"], float("nan")])
def test_what_is_no_text(value: object):
    with pytest.raises(ValueError, match="row 3 must hold text, not "):
        checked_text(value, "row 3")
