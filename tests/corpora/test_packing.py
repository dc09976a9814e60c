"""Packing: recorded rows, a slow reference, and independence of the number of processes."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from configuration.data_request import data_request
from corpora import packing
from corpora.packing import RowMaker, map_in_order, pack, pad
from corpora.tokenization import load_tokenizer
from dataloader import get_dataloaders, get_tokenizer

RECORDED = [("lambada", "gpt2", 1024), ("wikitext2", "gpt2", 1024), ("lm1b", "bert", 128)]
FLAGS = [(True, True), (False, True), (True, False), (False, False)]


def reference_rows(documents, length, bos, eos, insert_eos, insert_special) -> list[list[int]]:
    stream = []
    for ids in documents:
        stream += [*ids, eos] if insert_eos else ids
    width = length - 2 if insert_special else length
    rows = []
    while len(stream) >= width:
        row, stream = stream[:width], stream[width:]
        rows.append([bos, *row, eos] if insert_special else row)
    return rows


@pytest.mark.parametrize(("insert_eos", "insert_special"), FLAGS)
@pytest.mark.parametrize("length", [3, 8, 50])
def test_pack_equals_the_reference(insert_eos: bool, insert_special: bool, length: int):
    random = np.random.default_rng(0)
    documents = [random.integers(10, 99, n).tolist() for n in random.integers(0, 12, 40)]
    rows = pack(
        documents,
        length=length,
        bos=1,
        eos=2,
        insert_eos=insert_eos,
        insert_special=insert_special,
    )
    assert rows.dtype == np.int32 and rows.shape[1] == length
    assert rows.tolist() == reference_rows(documents, length, 1, 2, insert_eos, insert_special)


def test_no_documents_give_no_rows():
    rows = pack([], length=8, bos=1, eos=2, insert_eos=True, insert_special=True)
    assert rows.shape == (0, 8)


def test_pad():
    ids, lengths = pad(
        [[5, 6], [], list(range(10, 20))],
        length=6,
        bos=1,
        eos=2,
        pad_id=0,
        insert_special=True,
    )
    expected = [[1, 5, 6, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 10, 11, 12, 13, 2]]
    assert (ids.tolist(), lengths.tolist()) == (expected, [4, 2, 6])


def copy_of(dataset: str, data: Path, num_docs: int, folder: Path) -> Path:
    """Writes the first documents of a set's file to a file of their own."""
    source = {
        "wikitext2": data / "wikitext-2/valid.txt",
        "lm1b": data / "lm1b/news.en.heldout-00000-of-00050",
        "lambada": data / "lambada/lambada_test.jsonl",
    }[dataset]
    lines = source.read_bytes().splitlines(keepends=True)[:num_docs]
    target = folder / f"first{source.suffix if dataset == 'lambada' else '.txt'}"
    target.write_bytes(b"".join(lines))
    return target


@pytest.mark.parametrize(("insert_eos", "insert_special"), FLAGS)
@pytest.mark.parametrize(("dataset", "tokenizer", "length"), RECORDED)
def test_rows_equal_the_recorded_ones(
    shared: Path,
    data_config: Callable[..., DictConfig],
    tmp_path: Path,
    request,
    dataset: str,
    tokenizer: str,
    length: int,
    insert_eos: bool,
    insert_special: bool,
):
    """Documents through configuration, cache and loader, against the original's rows."""
    (entry,) = (
        e
        for e in json.loads((shared / "golden/data.json").read_text())
        if (e["dataset"], e["tokenizer"], e["length"]) == (dataset, tokenizer, length)
        and (e["insert_eos"], e["insert_special"]) == (insert_eos, insert_special)
    )
    path = copy_of(dataset, shared / "data", entry["num_docs"], tmp_path)
    config = data_config(
        f"data={'lm1b-wrap' if dataset == 'lm1b' else dataset}",
        f"data.path={path}",
        f"model.length={length}",
        f"+data.insert_valid_eos={insert_eos}",
        f"+data.insert_valid_special={insert_special}",
    )
    tokenizer = request.getfixturevalue(tokenizer)
    _, loader = get_dataloaders(data_request(config), tokenizer, skip_train=True)
    rows = np.concatenate([batch["input_ids"].numpy() for batch in loader])
    assert len(rows) == entry["rows"]
    assert rows[0, : len(entry["first"])].tolist() == entry["first"]
    assert rows[-1, -len(entry["last"]) :].tolist() == entry["last"]
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest() == entry["sha256"]


def test_remainder_of_each_thousand_documents_is_dropped(local_config, tmp_path: Path):
    """Surprising, and kept: published numbers depend on it."""
    (tmp_path / "train.txt").write_text("ab\n" * 2_500)
    config = local_config("data.tokenizer_name_or_path=bytes", "loader.batch_size=1")
    data = data_request(config)
    train, _ = get_dataloaders(data, get_tokenizer(data), skip_valid=True)
    assert len(train.dataset) == 2 * (3 * 1_000 // 14) + 3 * 500 // 14


def some_batches() -> Iterator[list[str]]:
    for start in range(0, 70, 10):
        yield [f"document number {i}" for i in range(start, start + 10)]


def test_rows_do_not_depend_on_the_number_of_processes(monkeypatch):
    """The original gave each process a slice of the documents, each with remainders of its own:
    the token set, and so the perplexity, depended on the number of CPUs of the machine."""
    monkeypatch.setattr(packing, "_CHARACTERS_WORTH_A_POOL", 300)
    row_maker = RowMaker(tokenizer=load_tokenizer("bytes"), length=8)
    alone, together = (
        [rows.ids.tolist() for rows in map_in_order(row_maker, some_batches(), num_proc=n)]
        for n in (1, 3)
    )
    assert alone == together and len(alone) == 7


@dataclasses.dataclass(frozen=True)
class Killing:
    """A row maker that kills its process."""

    def __call__(self, texts: list[str]) -> None:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_dies_is_told_in_a_line(monkeypatch):
    """It was a traceback of BrokenProcessPool."""
    monkeypatch.setattr(packing, "_CHARACTERS_WORTH_A_POOL", 0)
    with pytest.raises(OSError, match="data.num_proc=3: one of the processes .* was killed"):
        list(map_in_order(Killing(), some_batches(), num_proc=3))


class FakePool:
    """Stands in for the processes, and counts the texts that they have been given."""

    def __init__(self, *_: object, **__: object):
        self.given: list[int] = []

    def submit(self, _, batch: list[str]) -> concurrent.futures.Future:
        self.given.append(sum(map(len, batch)))
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(len(self.given))
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.mark.parametrize("characters", [10, 1_000, 100_000])
def test_text_in_flight_is_bounded(monkeypatch, characters: int):
    """32 batches lay in memory before the first was tokenized, whatever their size."""
    monkeypatch.setattr(packing, "_CHARACTERS_WORTH_A_POOL", 0)
    monkeypatch.setattr(packing, "_CHARACTERS_IN_FLIGHT", 4_000)
    pool = FakePool()
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *_, **__: pool)
    read = 0

    def batches() -> Iterator[list[str]]:
        nonlocal read
        for _ in range(50):
            read += 1
            yield ["a" * characters]

    for done, _ in enumerate(map_in_order(lambda _: 0, batches(), num_proc=4), start=1):
        most = {10: 8, 1_000: 4, 100_000: 1}[characters]
        assert read - done <= most + 1
    assert done == 50


def test_small_data_start_no_process(monkeypatch):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", None)
    row_maker = RowMaker(tokenizer=load_tokenizer("bytes"), length=8)
    assert len(list(map_in_order(row_maker, some_batches(), num_proc=64))) == 7
