"""The files of samples: columns, concurrent jobs, killed jobs, files of the original."""

import csv
import errno
import json
import math
import multiprocessing
from pathlib import Path

import fsspec
import pytest
import torch

from evaluation import sample_log
from evaluation.sample_log import (
    COLUMNS,
    ORIGINAL_COLUMNS,
    SampleRecord,
    append_samples,
    find_sample_files,
    read_samples,
)

HOSTILE_TEXTS = [
    'quotes " and "" and, commas',
    "lines\nof\r\nseveral\rkinds\n",
    "\u2028 \u0085 \x0b \x00 é 語",
    "",
    "=1+1",
    "[MASK]<|endoftext|>",
    "x" * 300_000,
]


def record(text: str = "text", **values) -> SampleRecord:
    defaults = {"gen_nfes": 3, "gen_lengths": 4, "seed": 1, "gen_ppl": 20.5, "gen_entropy": 1.25}
    return SampleRecord(samples=text, **defaults | values)


def without_extra(records: list[SampleRecord]) -> list[dict]:
    return [item.values() for item in records]


def test_columns(tmp_path):
    """The original never wrote a header; users' scripts read its six columns in this order."""
    path = append_samples(str(tmp_path), [record(gen_nfes_paper=2)])
    append_samples(str(tmp_path), [record(gen_nfes_paper=2)])
    header, *rows = Path(path).read_text().splitlines()
    assert header == "gen_ppl,gen_nfes,gen_entropy,gen_lengths,samples,seed,gen_nfes_paper"
    assert rows == ["20.5,3,1.25,4,text,1,2"] * 2


def test_one_row_per_sample(tmp_path):
    """With more than one sample per batch the original's rows were out of step."""
    records = [record(f"text {i}", gen_ppl=i + 0.5, gen_lengths=i) for i in range(5)]
    path = append_samples(str(tmp_path), records[:3])
    append_samples(str(tmp_path), records[3:])
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["samples"] for row in rows] == [f"text {i}" for i in range(5)]
    assert [float(row["gen_ppl"]) for row in rows] == [i + 0.5 for i in range(5)]


@pytest.mark.parametrize("name", ["samples.csv", "samples.jsonl"])
def test_any_text_and_number_comes_back(tmp_path, name):
    """Also cells beyond 131,072 characters, which Python's csv refuses, and seeds of 63 bits."""
    records = [record(text, seed=2**62 + i) for i, text in enumerate(HOSTILE_TEXTS)]
    records += [record(gen_ppl=None, gen_entropy=None, gen_nfes_paper=7)]
    limit = csv.field_size_limit(1000)
    append_samples(str(tmp_path), records[:4])
    append_samples(str(tmp_path), records[4:])
    found = read_samples(tmp_path / name)
    assert csv.field_size_limit(limit) == 1000, "a global setting is put back"
    assert without_extra(found) == without_extra(records)


def test_numbers_of_tensors(tmp_path):
    append_samples(str(tmp_path), [record(gen_nfes=torch.tensor(3), gen_ppl=torch.tensor(20.5))])
    for name in ("samples.csv", "samples.jsonl"):
        assert without_extra(read_samples(tmp_path / name)) == [record().values()]


def test_what_was_not_measured_is_empty(tmp_path):
    """NaN is no JSON; a text without a counted token has no perplexity."""
    append_samples(str(tmp_path), [record(gen_ppl=math.nan)])
    line = (tmp_path / "samples.jsonl").read_text()
    assert json.loads(line)["gen_ppl"] is None and "NaN" not in line
    assert (tmp_path / "samples.csv").read_text().splitlines()[1].startswith(",3,")


def test_an_infinite_perplexity_is_no_json_number(tmp_path):
    """`Infinity` is what Python writes, and what no other reader of JSON takes."""
    append_samples(str(tmp_path), [record(gen_ppl=math.inf, extra={"odds": [1.0, -math.inf]})])
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    entries = json.loads(line, parse_constant=pytest.fail)
    assert entries["gen_ppl"] is None and entries["odds"] == [1.0, None]
    assert read_samples(tmp_path / "samples.jsonl")[0].gen_ppl is None
    assert read_samples(tmp_path / "samples.csv")[0].gen_ppl == math.inf


def test_files_that_windows_saved_again(tmp_path):
    """With a byte-order mark the first column was none of a table of samples."""
    append_samples(str(tmp_path), [record("a\u2028b\x85c")])
    for name in ("samples.csv", "samples.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert [found.samples for found in read_samples(path)] == ["a\u2028b\x85c"]


def test_metadata_is_in_the_json(tmp_path):
    extra = {"rank": 2, "accepted": False, "prompt": None, "checkpoint": Path("a/last.ckpt")}
    append_samples(str(tmp_path), [record(extra=extra)])
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    entries = json.loads(line)
    assert list(entries)[: len(COLUMNS)] == list(COLUMNS)
    assert entries["rank"] == 2 and entries["accepted"] is False
    assert entries["checkpoint"] == "a/last.ckpt" and entries["time"].endswith("+00:00")
    assert read_samples(tmp_path / "samples.jsonl")[0].extra["rank"] == 2


def test_metadata_may_not_hide_a_column(tmp_path):
    with pytest.raises(ValueError, match="seed"):
        append_samples(str(tmp_path), [record(extra={"seed": 3})])
    assert not list(tmp_path.iterdir())


def test_a_lone_surrogate_loses_no_sample(tmp_path):
    append_samples(str(tmp_path), [record("\ud800")])
    assert read_samples(tmp_path / "samples.jsonl")[0].samples == "\ud800"
    assert read_samples(tmp_path / "samples.csv")[0].samples == "\\ud800"


def write_many(logdir: str, job: int, barrier) -> None:
    barrier.wait()
    for i in range(20):
        append_samples(logdir, [record(f"{job}-{i}\n" + "x" * 5000, seed=job)] * 2)


def test_concurrent_jobs(tmp_path):
    """Jobs of several seeds share a directory: one header, and no row inside another."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    jobs = [
        context.Process(target=write_many, args=(str(tmp_path), job, barrier)) for job in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 4
    for name in ("samples.csv", "samples.jsonl"):
        records = read_samples(tmp_path / name)
        assert len(records) == 4 * 20 * 2
        for job in range(4):
            texts = [item.samples.split("\n")[0] for item in records if item.seed == job]
            assert texts == [f"{job}-{i}" for i in range(20) for _ in range(2)]
    assert (tmp_path / "samples.csv").read_text().count("gen_ppl") == 1


@pytest.mark.parametrize("kept", range(1, 40, 3))
def test_a_torn_row_harms_no_other(tmp_path, kept):
    """A process killed while writing leaves half a row, maybe with an open quote."""
    texts = ['first "a"\nb', 'torn, "q"\n\nin many places\n"']
    append_samples(str(tmp_path), [record(texts[0])])
    sizes = {path: path.stat().st_size for path in tmp_path.iterdir()}
    append_samples(str(tmp_path), [record(texts[1])])
    for path, size in sizes.items():
        path.write_bytes(path.read_bytes()[: size + kept])
    append_samples(str(tmp_path), [record("third")])
    for path in sizes:
        assert [item.samples for item in read_samples(path)] == [texts[0], "third"], path.name


@pytest.mark.parametrize("kept", range(0, 70, 9))
def test_a_torn_header_is_written_again(tmp_path, kept):
    header = ",".join(COLUMNS)
    (tmp_path / "samples.csv").write_text(header[:kept])
    append_samples(str(tmp_path), [record()])
    assert (tmp_path / "samples.csv").read_text().splitlines()[0] == header
    assert without_extra(read_samples(tmp_path / "samples.csv")) == [record().values()]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    append_samples(str(tmp_path), [record("first")])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class FullDisk(sample_log.io.FileIO):
        def write(self, data):
            if len(data) < 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:1000])

    monkeypatch.setattr(sample_log.io, "FileIO", FullDisk)
    with pytest.raises(OSError, match="samples.jsonl: cannot be written .*No space left"):
        append_samples(str(tmp_path), [record("x" * 2500)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "log").write_text("")
    with pytest.raises(OSError, match="log: cannot be written"):
        append_samples(str(tmp_path / "log"), [record()])


def original_row(**cells) -> str:
    values = {
        "gen_ppl": "33.4", "gen_nfes": "1024", "gen_entropy": "5.2",
        "gen_lengths": "1023.0", "samples": '"text, of\n""two"" lines"', "seed": "2",
    } | cells  # fmt: skip
    return ",".join(values[name] for name in ORIGINAL_COLUMNS) + "\r\n"


def test_a_file_of_the_original(tmp_path):
    """No header, six columns, numbers that may be printed as lists or tensors."""
    path = tmp_path / "samples.csv"
    wrapped = original_row(
        gen_ppl="[31.5]", gen_lengths="\"tensor(7., device='cuda:0')\"", gen_entropy="tensor(nan)"
    )
    path.write_text(original_row() + wrapped, newline="")
    first, second = read_samples(path)
    assert first == SampleRecord(
        samples='text, of\n"two" lines', gen_ppl=33.4, gen_nfes=1024, gen_entropy=5.2,
        gen_lengths=1023, seed=2, gen_nfes_paper=None,
    )  # fmt: skip
    assert (second.gen_ppl, second.gen_lengths, second.gen_entropy) == (31.5, 7, None)


@pytest.mark.parametrize("header", ["", ",".join(ORIGINAL_COLUMNS) + "\n"])
def test_rows_fit_the_file_that_is_there(tmp_path, header):
    """Rows added to a file of six columns have six."""
    path = tmp_path / "samples.csv"
    path.write_text(header + original_row(), newline="")
    append_samples(str(tmp_path), [record(gen_nfes_paper=9)])
    old, new = read_samples(path)
    assert old.gen_ppl == 33.4 and new == record(gen_nfes_paper=None)
    assert read_samples(tmp_path / "samples.jsonl")[0].gen_nfes_paper == 9


def test_another_table_is_not_added_to(tmp_path):
    path = tmp_path / "samples.csv"
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"samples\.csv, line 1: .*gen_ppl"):
        append_samples(str(tmp_path), [record()])
    assert path.read_text() == "step,loss\n1,2\n"


def test_places_without_append(tmp_path):
    """Object stores cannot append: every call has files of its own."""
    paths = [append_samples("memory://bucket/run", [record(f"text {i}")]) for i in range(2)]
    assert len(set(paths)) == 2
    fs = fsspec.filesystem("memory")
    found = sorted(fs.glob("/bucket/run/*"))
    assert len(found) == 4
    for path in found:
        (tmp_path / Path(path).name).write_bytes(fs.cat(path))
    files = find_sample_files(tmp_path)
    texts = sorted(item.samples for file in files for item in read_samples(file))
    assert texts == ["text 0", "text 1"]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sample_log.fcntl, "flock", refuse)
    paths = [append_samples(str(tmp_path), [record()]) for _ in range(2)]
    assert sorted(find_sample_files(tmp_path)) == sorted(map(Path, paths))


def test_a_directory_stands_for_every_sample_once(tmp_path):
    append_samples(str(tmp_path), [record()])
    (tmp_path / "other.jsonl").write_text((tmp_path / "samples.jsonl").read_text())
    (tmp_path / "notes.txt").write_text("")
    names = [path.name for path in find_sample_files(tmp_path)]
    assert names == ["samples.csv", "other.jsonl"], "samples.jsonl holds what samples.csv holds"


BROKEN_CSV = [
    ("1,2\n", 1, "not a table"),
    (original_row() + "1,2,3\n", 3, "3 cells instead of 6"),
    (original_row() * 2 + original_row(gen_nfes="many"), 5, "gen_nfes is 'many'"),
    (original_row(gen_ppl="__import__('os').system('x')"), 1, "gen_ppl is"),
    (original_row(seed="1e999"), 1, "seed is"),
    (original_row() + '1,2,3,4,"open', 3, "not a row of CSV"),
]
BROKEN_JSONL = [
    ('{"gen_ppl": 1', 1, "not JSON"),
    ("{}\n", 1, "needs"),
    ("[1]\n", 1, "no JSON object"),
    ("\n\xff{", 2, "not JSON"),
    (json.dumps(record().values() | {"gen_nfes": [1, "a"]}), 1, "gen_nfes is"),
]


@pytest.mark.parametrize(
    ("suffix", "content", "line", "cause"),
    [("csv", *case) for case in BROKEN_CSV] + [("jsonl", *case) for case in BROKEN_JSONL],
)
def test_broken_files_are_named_with_the_line(tmp_path, suffix, content, line, cause):
    path = tmp_path / f"samples.{suffix}"
    path.write_text(content, newline="")
    with pytest.raises(ValueError, match=cause) as caught:
        read_samples(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


@pytest.mark.parametrize("name", ["samples.csv", "samples.jsonl"])
def test_nothing_to_read(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        find_sample_files(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no .csv or .jsonl"):
        find_sample_files(tmp_path)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"{name}: no samples"):
        read_samples(tmp_path / name)
    (tmp_path / "samples.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match="no samples"):
        read_samples(tmp_path / "samples.csv")
