"""The cache of packed rows: what its name covers, who builds, and what failure leaves behind."""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

import dataloader
from configuration.data_request import data_request
from corpora import row_cache
from corpora.packing import Rows
from corpora.row_cache import get_or_build
from corpora.row_datasets import PackedRows
from corpora.tokenization import load_tokenizer
from dataloader import get_dataloaders, get_tokenizer
from training.signals import Interrupted

KEY = {"length": 4, "vocab_size": 300}


def some_rows(value: int = 7, rows: int = 3) -> Rows:
    return Rows(
        ids=np.full((rows, 4), value, dtype=np.int32),
        lengths=np.full(rows, 4, dtype=np.int32),
        num_documents=1,
        num_tokens=rows * 4,
    )


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def build(config: DictConfig, tokenizer=None) -> Path:
    """Prepares the validation rows and returns the cache entry that this added."""
    folder = Path(config.data.cache_dir) / "rows"
    before = set(entries(folder)) if folder.exists() else set()
    data = data_request(config)
    get_dataloaders(data, tokenizer or get_tokenizer(data), skip_train=True)
    (added,) = set(entries(folder)) - before
    return added


def test_name_covers_everything_that_shapes_the_rows(
    local_config: Callable[..., DictConfig], tmp_path: Path
):
    """The original's cache file was named by set, split, length and one flag: another
    tokenizer, revision or the other flag silently got the wrong rows."""
    build(local_config())
    for override in [
        "data.tokenizer_name_or_path=bpe-300",
        "+data.insert_valid_eos=false",
        "+data.insert_valid_special=false",
        "model.length=17",
        "data.wrap=false",
        "data.document=paragraph",
        f"data.valid_path={tmp_path}/train.txt",
        f"data.valid_path={tmp_path}/*.txt",
    ]:
        build(local_config(override))


def test_one_file_has_one_entry_however_its_path_is_written(
    local_config, tmp_path: Path, monkeypatch
):
    """Used from Python, without `main`, paths are those of the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    build(local_config())
    for path in ("../valid.txt", "'~/valid.txt'"):
        config = local_config(f"data.valid_path={path}", "data.cache_dir=../cache")
        get_dataloaders(data_request(config), get_tokenizer(data_request(config)), skip_train=True)
    assert len(entries(tmp_path / "cache/rows")) == 1


def test_changed_file_gets_rows_of_its_own(local_config, tmp_path: Path):
    build(local_config())
    with open(tmp_path / "valid.txt", "a") as file:
        file.write("one more line\n")
    build(local_config())
    os.utime(tmp_path / "valid.txt", (1, 1))
    build(local_config())


def test_tokenizers_of_equal_name_but_other_rules_differ(local_config):
    plain, limited = load_tokenizer("bytes"), load_tokenizer("bytes")
    limited.bos_token = "[EOS]"
    build(local_config(), plain)
    build(local_config(), limited)


def test_second_opening_builds_nothing_and_maps_the_file(tmp_path: Path):
    get_or_build(str(tmp_path), "set valid", KEY, lambda first: [some_rows(), some_rows(8)])

    def never(first: int) -> Iterator[Rows]:
        raise AssertionError("built twice")

    rows = get_or_build(str(tmp_path), "set valid", KEY, never)
    assert isinstance(rows.ids, np.memmap)
    assert rows.ids[:, 0].tolist() == [7, 7, 7, 8, 8, 8]


def test_last_line_says_documents_tokens_rows_and_hash(tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, logger="corpora"):
        rows = get_or_build(
            str(tmp_path), "set valid", KEY, lambda first: [some_rows(), some_rows()]
        )
    expected = hashlib.sha256(np.full((6, 4), 7, dtype="<i4").tobytes()).hexdigest()
    assert rows.sha256 == expected
    assert caplog.messages == [f"set valid: 2 documents, 24 tokens, 6 rows of 4, sha256 {expected}"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "ids.uint16").write_bytes(b"short"),
        lambda entry: (entry / "ids.uint16").write_bytes(b"\x09\x00" * 12),
        lambda entry: (entry / "lengths.int32").write_bytes(b"\x09\x00\x00\x00" * 3),
        lambda entry: (entry / "lengths.int32").unlink(),
    ],
)
def test_corrupt_entry_is_built_again_with_a_warning(tmp_path: Path, caplog, damage):
    get_or_build(str(tmp_path), "set valid", KEY, lambda first: [some_rows()])
    damage(entries(tmp_path)[0])
    rows = get_or_build(str(tmp_path), "set valid", KEY, lambda first: [some_rows()])
    assert rows.ids.tolist() == [[7] * 4] * 3 and rows.lengths.tolist() == [4] * 3
    assert "is corrupt" in caplog.text


def test_one_builds_while_the_others_wait(tmp_path: Path):
    built = []

    def slowly(first: int) -> Iterator[Rows]:
        built.append(threading.get_ident())
        time.sleep(0.3)
        yield some_rows()

    results = []
    ranks = [
        threading.Thread(
            target=lambda: results.append(get_or_build(str(tmp_path), "set", KEY, slowly))
        )
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(built) == 1 and len(results) == 4


# --- a build that does not reach its end ---------------------------------------------------------


def batches_from(first: int, *, until: int | None = None, total: int = 9) -> Iterator[Rows]:
    """Batches of different rows and sizes; the build is killed before batch `until`."""
    for batch in range(first, total):
        if batch == until:
            raise Killed
        yield some_rows(batch, rows=batch % 4)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of an entry that was built in one go."""
    get_or_build(str(tmp_path / "whole"), "set", KEY, batches_from)
    return contents(entries(tmp_path / "whole")[0])


def contents(entry: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.iterdir()}


def starts_of_build(cache_dir: Path) -> list[int]:
    """Build the set, and return how many batches it had already when asked for the rest."""
    begun: list[int] = []
    get_or_build(
        str(cache_dir), "set", KEY, lambda first: begun.append(first) or batches_from(first)
    )
    return begun


def kill_before(cache: Path, batch: int, monkeypatch) -> Path:
    """Leaves what a process that is killed there has written; returns the half-built entry.

    The files' last bytes are written, but not committed.
    """
    commit = row_cache._Builder._commit
    with monkeypatch.context() as patch:
        patch.setattr(row_cache._Builder, "__exit__", lambda self, *_: close(self))
        with pytest.raises(Killed):
            get_or_build(str(cache), "set", KEY, lambda first: batches_from(first, until=batch))
        assert row_cache._Builder._commit is commit
    return next(cache.glob("*.partial"))


def close(builder: row_cache._Builder) -> None:
    builder._ids.close()
    builder._lengths.close()


@pytest.mark.parametrize("commit_every", [0, 1e9])
def test_killed_five_times_it_ends_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch, whole, commit_every, caplog
):
    """A tokenization that was killed after hours began anew."""
    caplog.set_level(logging.INFO, logger="corpora")
    monkeypatch.setattr(row_cache, "_COMMIT_EVERY", commit_every)
    for batch in (0, 2, 3, 7, 9 - 1):
        kill_before(tmp_path / "cache", batch, monkeypatch)
    begun = starts_of_build(tmp_path / "cache")
    assert begun == ([8] if commit_every == 0 else [0])
    assert ("12 rows are kept" in caplog.text) == (commit_every == 0)
    assert contents(entries(tmp_path / "cache")[0]) == whole
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("torn", [b"", b"\x01", b"\x01\x02" * 5_000])
def test_what_is_behind_the_last_commit_is_dropped(tmp_path, monkeypatch, whole, torn: bytes):
    monkeypatch.setattr(row_cache, "_COMMIT_EVERY", 0)
    partial = kill_before(tmp_path / "cache", 6, monkeypatch)
    for name in ("ids.uint16", "lengths.int32", "meta.json.partial"):
        with open(partial / name, "ab") as file:
            file.write(torn)
    get_or_build(str(tmp_path / "cache"), "set", KEY, batches_from)
    assert contents(entries(tmp_path / "cache")[0]) == whole


def test_killed_between_the_last_commit_and_the_renaming(tmp_path, monkeypatch, whole):
    """Nothing is left to tokenize."""
    monkeypatch.setattr(row_cache, "_COMMIT_EVERY", 0)
    with pytest.raises(Killed):
        get_or_build(str(tmp_path / "cache"), "set", KEY, then_killed)
    get_or_build(str(tmp_path / "cache"), "set", KEY, batches_from)
    assert contents(entries(tmp_path / "cache")[0]) == whole


def then_killed(first: int) -> Iterator[Rows]:
    yield from batches_from(first)
    raise Killed


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: (partial / "ids.uint16").write_bytes(b"short"),
        lambda partial: (partial / "ids.uint16").write_bytes(b"\x09\x00" * 999),
        lambda partial: (partial / "lengths.int32").unlink(),
        lambda partial: (partial / "meta.json").write_text("{"),
        lambda partial: (partial / "meta.json").write_text("[]"),
    ],
)
def test_pieces_that_are_damaged_are_made_again(tmp_path, monkeypatch, whole, damage):
    monkeypatch.setattr(row_cache, "_COMMIT_EVERY", 0)
    damage(kill_before(tmp_path / "cache", 6, monkeypatch))
    get_or_build(str(tmp_path / "cache"), "set", KEY, batches_from)
    assert contents(entries(tmp_path / "cache")[0]) == whole


@pytest.mark.parametrize("error", [ValueError("line 7"), Interrupted(15), KeyboardInterrupt()])
def test_a_build_that_fails_keeps_what_it_has(tmp_path: Path, whole, error: BaseException):
    """A download that breaks off, a signal; and what is there is no entry yet."""

    def broken(first: int) -> Iterator[Rows]:
        yield from batches_from(first, total=5)
        raise error

    begun = []
    with pytest.raises(type(error)):
        get_or_build(str(tmp_path / "cache"), "set", KEY, broken)
    get_or_build(
        str(tmp_path / "cache"),
        "set",
        KEY,
        lambda first: begun.append(first) or batches_from(first),
    )
    assert begun == [5]
    assert contents(entries(tmp_path / "cache")[0]) == whole


def test_a_real_build_goes_on_with_the_documents_that_are_left(
    local_config, tmp_path: Path, monkeypatch
):
    """They are left out without being tokenized; real keys hold tuples, which JSON does not."""
    monkeypatch.setattr("dataloader.DOCUMENTS_PER_BATCH", 3)
    config = local_config("data.document=line")
    expected = contents(build(config))
    make, made, left = dataloader.map_in_order, [], 2

    def failing(row_maker, batches, *, num_proc):
        for rows in make(row_maker, batches, num_proc=num_proc):
            if len(made) == left:
                raise Interrupted(15)
            made.append(rows.num_documents)
            yield rows

    config.data.cache_dir = str(tmp_path / "again")
    monkeypatch.setattr("dataloader.map_in_order", failing)
    with pytest.raises(Interrupted):
        build(config)
    made.clear()
    left = -1
    data = data_request(config)
    get_dataloaders(data, get_tokenizer(data), skip_train=True)
    (entry,) = entries(tmp_path / "again/rows")
    assert contents(entry) == expected
    assert len(made) == json.loads(expected["meta.json"])["batches"] - 2 > 1


def test_half_built_entries_of_texts_that_changed_are_removed(tmp_path: Path):
    """Of former versions too; younger ones and the one that is gone on with stay."""
    old = [tmp_path / "a.partial", tmp_path / "b.tmp-x7"]
    for folder in [*old, tmp_path / "new.partial"]:
        folder.mkdir()
        (folder / "ids").touch()
    for path in [*old, *(folder / "ids" for folder in old)]:
        os.utime(path, (1, 1))
    get_or_build(str(tmp_path), "set", KEY, lambda first: [some_rows()])
    left = [path.name for path in entries(tmp_path)]
    assert left[0] == "new.partial" and len(left) == 2


# --- what the numbers are kept in ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(300, "uint16"), (1 << 16, "uint16"), (65_537, "int32")]
)
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path: Path, vocab_size, name):
    """OpenWebText took 36 GB; 18 are enough. The hash is that of int32 either way."""
    ids = np.array([[0, 1, 255, 256], [vocab_size - 1, 0, 32_767, 32_768]], dtype=np.int32)
    ids = np.minimum(ids, vocab_size - 1).astype(np.int32)
    batch = Rows(ids=ids, lengths=np.array([4, 3], np.int32), num_documents=2, num_tokens=7)
    key = KEY | {"vocab_size": vocab_size}
    rows = get_or_build(str(tmp_path), "set", key, lambda first: [batch])
    assert rows.ids.tolist() == ids.tolist() and rows.lengths.tolist() == [4, 3]
    assert rows.sha256 == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    size = (entries(tmp_path)[0] / f"ids.{name}").stat().st_size
    assert size == ids.size * np.dtype(name).itemsize
    assert PackedRows(rows)[1]["input_ids"].tolist() == ids[1].tolist()


def test_the_hash_does_not_depend_on_chunks(monkeypatch):
    values = np.arange(100, dtype="<u2").reshape(20, 5)
    monkeypatch.setattr(row_cache, "_CHUNK", 7)
    expected = hashlib.sha256(values.astype("<i4").tobytes()).hexdigest()
    assert row_cache._hash(values).hexdigest() == expected


def test_an_id_beyond_the_vocabulary_is_not_cut_to_two_bytes(tmp_path: Path):
    with pytest.raises(ValueError, match="id 70000, .* ends at 299"):
        get_or_build(str(tmp_path), "set", KEY, lambda first: [some_rows(70_000)])


# --- waiting, and places that cannot be written --------------------------------------------------


def test_waiting_says_for_whom(tmp_path: Path, monkeypatch, caplog):
    """A job on another node stood still without a word while the first one tokenized."""
    caplog.set_level(logging.INFO, logger="corpora")
    monkeypatch.setattr(row_cache, "_FIRST_NOTICE", 0.05)
    inside, leave = threading.Event(), threading.Event()

    def slowly(first: int) -> Iterator[Rows]:
        inside.set()
        leave.wait(20)
        yield some_rows()

    def ask() -> None:
        get_or_build(str(tmp_path), "set", KEY, slowly)

    first, second = threading.Thread(target=ask), threading.Thread(target=ask)
    first.start()
    inside.wait(20)
    second.start()
    while "Waiting" not in caplog.text:
        assert second.is_alive()
        time.sleep(0.01)
    leave.set()
    first.join()
    second.join()
    assert f"Waiting for process {os.getpid()} on {socket.gethostname()}" in caplog.text


def test_unwritable_cache(local_config, tmp_path: Path):
    (tmp_path / "occupied").write_text("a file, not a directory")
    config = local_config(f"data.cache_dir={tmp_path}/occupied/cache")
    with pytest.raises(OSError, match="data.cache_dir: cannot write .*occupied.*writable"):
        get_dataloaders(data_request(config), get_tokenizer(data_request(config)), skip_train=True)


def test_full_disk(tmp_path: Path, monkeypatch, whole):
    """The message says what to do and that what is finished is kept, and so it is."""
    monkeypatch.setattr(row_cache, "_COMMIT_EVERY", 0)
    sync, left = os.fsync, [7]

    def until_full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", until_full)
        with pytest.raises(OSError, match="data.cache_dir: .*No space left.* is kept") as caught:
            get_or_build(str(tmp_path / "cache"), "set", KEY, batches_from)
    assert caught.value.errno == errno.ENOSPC
    begun = starts_of_build(tmp_path / "cache")
    assert begun == [2]  # three calls each
    assert contents(entries(tmp_path / "cache")[0]) == whole


def test_an_error_of_the_documents_is_not_the_caches(tmp_path: Path):
    """A file that vanished was blamed on data.cache_dir."""

    def vanished(first: int) -> Iterator[Rows]:
        yield some_rows()
        raise FileNotFoundError(errno.ENOENT, "No such file", "train.txt")

    with pytest.raises(FileNotFoundError, match="train.txt") as caught:
        get_or_build(str(tmp_path), "set", KEY, vanished)
    assert "cache_dir" not in str(caught.value)


def test_trained_tokenizer_is_kept(local_config, caplog):
    """An evaluation in another run must get the tokenizer that training used."""
    config = local_config("data.tokenizer_name_or_path=bpe-300")
    with caplog.at_level(logging.INFO, logger="dataloader"):
        first, second = get_tokenizer(data_request(config)), get_tokenizer(data_request(config))
        assert first.get_vocab() == second.get_vocab()
        assert len([message for message in caplog.messages if "Trained bpe-300" in message]) == 1
        shutil.rmtree(config.data.cache_dir)
        assert get_tokenizer(data_request(config)).backend_tokenizer.to_str() == (
            first.backend_tokenizer.to_str()
        )
