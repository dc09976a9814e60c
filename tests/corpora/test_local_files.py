"""Reading files: formats, document modes, places, and what is said about bad ones."""

import gzip
import io
import json
import struct
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from corpora.local_files import RAW_LINE, files_of_split, find_files, read_documents


def texts(path: object, *, document: str = "line", column: str = "text") -> list[str]:
    files = find_files(str(path), key="data.train_path")
    return [found[column] for found in read_documents(files, document, column)]


TEXT = "one\ntwo\n\n \nthree\r\n  four"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\ntwo\n\n \nthree\n  four"]),
        ("paragraph", ["one\ntwo", "three\n  four"]),
        ("line", ["one", "two", "three", "  four"]),
        (RAW_LINE, ["one\n", "two\n", "", " \n", "three\n", "  four"]),
    ],
)
def test_document_modes(tmp_path: Path, document: str, expected: list[str]):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # with a byte order mark
    assert texts(tmp_path / "a.txt", document=document) == expected


def write(path: Path, lines: list[str]) -> Path:
    """Writes documents in the format that the suffix names."""
    records = [{"text": line, "label": i} for i, line in enumerate(lines)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    is_json = ".jsonl" in path.name
    content = "\n".join(json.dumps(r) if is_json else r["text"] for r in records).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
)
def test_formats(tmp_path: Path, name: str):
    """Other columns than the text's are no obstacle; the original crashed on them."""
    assert texts(write(tmp_path / name, ["α", "b c"])) == ["α", "b c"]


def test_saved_dataset(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"n": [1, 2], "text": ["a", "b"]})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved/train") == ["a", "b"]
    files = files_of_split(find_files(str(tmp_path / "saved"), key="k"), "test", key="k")
    assert [found["text"] for found in read_documents(files, "line", "text")] == ["a"]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
def test_both_formats_of_arrow(tmp_path: Path, make, suffix: str, compression: str | None):
    """The file format is what polars and R write: it was read as a stream, whose length its first
    letters are not."""
    table = pa.table({"text": [f"α{i}" for i in range(5)], "n": range(5)})
    content = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with make(content, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(suffix, bytes)
    path = tmp_path / f"a.arrow{suffix}"
    path.write_bytes(compress(content.getvalue()))
    assert texts(path) == [f"α{i}" for i in range(5)]


def test_lone_surrogates_become_the_replacement_character(tmp_path: Path):
    """JSON spells half an emoji; tokenizers raised a TypeError that named no file."""
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "cut \ud83d here", "n": 1}' + "\n" + r'{"text": "\ud83d\ude00"}')
    assert texts(path) == ["cut \ufffd here", "😀"]


def test_bytes_in_a_table_that_are_no_text_are_named(tmp_path: Path):
    """Half of an emoji again, as Java writes it; Arrow takes it for text."""
    broken = pa.array([b"fine", b"half \xed\xa0\xbd"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2: data.text_column='text': not UTF-8"):
        texts(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["fine", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2: data.text_column='text' must hold"):
        texts(tmp_path / "a.parquet")


def test_a_name_that_two_columns_have(tmp_path: Path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(
        file, table.schema
    ) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="no single column data.text_column='text'"):
        texts(tmp_path / "a.arrow")


def test_directories_and_globs_are_read_in_sorted_order(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/c.txt", "b.jsonl", "a.txt"):
        write(tmp_path / name, [name])
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("of another type")
    assert texts(tmp_path) == ["a.txt", "b.jsonl", "sub/c.txt"]
    assert texts(tmp_path / "*.txt") == ["a.txt"]
    assert texts(tmp_path / "**/*.txt") == ["a.txt", "sub/c.txt"]


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls(tmp_path: Path, protocol: str):
    root = f"{protocol}://{tmp_path}/texts"
    filesystem, folder = fsspec.core.url_to_fs(root)
    filesystem.makedirs(folder)
    with fsspec.open(f"{root}/a.txt.gz", "wb") as stream:
        stream.write(gzip.compress(b"from afar"))
    assert texts(f"{root}/a.txt.gz") == texts(f"{root}/*.gz") == texts(root) == ["from afar"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nnot \xff utf-8", r"a.txt, line 2: not UTF-8: byte 5 .* 0xff"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"content": "x"}', r"a.jsonl, line 1: no field data.text_column='text'"),
        ("a.jsonl", b'{"text": 7}', r"a.jsonl, line 1: data.text_column='text' must hold text"),
        ("a.jsonl", b'{"text": null}', r"a.jsonl, line 1: data.text_column='text' must hold text"),
        ("a.jsonl", b"[1]", r"a.jsonl, line 1: no JSON object but \[1\]"),
        ("a.jsonl", b"[" * 99_999, r"a.jsonl, line 1: not JSON"),
        ("a.parquet", b"PAR1 or so", r"a.parquet is no readable parquet file"),
        ("a.parquet.gz", b"not compressed", r"a.parquet.gz is no readable parquet file"),
        ("a.arrow", b"ARROW1 or so", r"a.arrow is no readable arrow file"),
        ("a.arrow.zst", b"not compressed", r"a.arrow.zst is no readable arrow file"),
        ("a.txt.gz", b"not compressed", r"a.txt.gz cannot be read"),
        ("a.txt.zst", b"not compressed", r"a.txt.zst cannot be read"),
    ],
)
def test_bad_content_is_reported_with_its_place(
    tmp_path: Path, name: str, content: bytes, message: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_missing_column_lists_the_columns(tmp_path: Path):
    path = write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match="data.text_column='body'; its columns: text, label"):
        texts(path, column="body")


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere", "*.txt"])
def test_missing_path(tmp_path: Path, path: str):
    with pytest.raises(FileNotFoundError, match="data.train_path=.*does not exist"):
        texts(tmp_path / path)


def test_unknown_type(tmp_path: Path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "a.docx"):
        with pytest.raises(ValueError, match="data.train_path=.*unknown type; allowed: .txt, "):
            texts(path)


def test_unknown_protocol():
    with pytest.raises(ValueError, match="data.train_path='nfs4://x/y.txt' cannot be opened"):
        texts("nfs4://x/y.txt")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.txt", "valid.txt", "test.txt"], "validation", ["valid.txt"]),
        (["wiki.train.tokens.txt", "wiki.valid.tokens.txt"], "train", ["wiki.train.tokens.txt"]),
        (
            ["training-monolingual/news.txt", "heldout-monolingual/news.txt"],
            "test",
            ["heldout-monolingual/news.txt"],
        ),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "train", None),
        (["a.txt", "b.txt"], "validation", None),
    ],
)
def test_split_is_read_off_the_names(
    tmp_path: Path, names: list[str], split: str, expected: list[str] | None
):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = files_of_split(find_files(str(tmp_path), key="data.path"), split, key="data.path")
    assert [file.name for file in files] == (sorted(names) if expected is None else expected)


def test_names_of_other_splits_only(tmp_path: Path):
    (tmp_path / "train.txt").touch()
    with pytest.raises(ValueError, match="data.path: no file is named as the test split"):
        files_of_split(find_files(str(tmp_path), key="data.path"), "test", key="data.path")


def test_arrow_offsets_that_lie(tmp_path: Path):
    """Arrow believed them, and ended the whole process."""
    table = pa.table({"text": ["one", "two", "three"]})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    content = buffer.getvalue()
    offsets = struct.pack("<4i", 0, 3, 6, 11)
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(
        content.replace(offsets, struct.pack("<4i", 0, 3, -900_000, 11))
    )
    with pytest.raises(ValueError, match="a.arrow is no readable arrow file"):
        texts(tmp_path / "a.arrow")
