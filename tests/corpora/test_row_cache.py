"""The cache of packed rows: what its name covers, who builds, and what failure leaves behind."""

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from configuration.data_request import data_request
from corpora import row_cache
from corpora.packing import Rows
from corpora.row_cache import get_or_build
from corpora.tokenization import load_tokenizer
from dataloader import get_dataloaders, get_tokenizer

KEY = {"length": 4}


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
    get_or_build(str(tmp_path), "set valid", KEY, lambda: [some_rows(), some_rows(8)])

    def never() -> Iterator[Rows]:
        raise AssertionError("built twice")

    rows = get_or_build(str(tmp_path), "set valid", KEY, never)
    assert isinstance(rows.ids, np.memmap)
    assert rows.ids[:, 0].tolist() == [7, 7, 7, 8, 8, 8]


def test_last_line_says_documents_tokens_rows_and_hash(tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, logger="corpora"):
        rows = get_or_build(str(tmp_path), "set valid", KEY, lambda: [some_rows(), some_rows()])
    expected = hashlib.sha256(np.full((6, 4), 7, dtype="<i4").tobytes()).hexdigest()
    assert rows.sha256 == expected
    assert caplog.messages == [f"set valid: 2 documents, 24 tokens, 6 rows of 4, sha256 {expected}"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "meta.json").unlink(),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "ids.int32").write_bytes(b"short"),
        lambda entry: (entry / "ids.int32").write_bytes(b"\x09\x00\x00\x00" * 12),
        lambda entry: (entry / "lengths.int32").write_bytes(b"\x09\x00\x00\x00" * 3),
        lambda entry: (entry / "lengths.int32").unlink(),
    ],
)
def test_corrupt_entry_is_built_again_with_a_warning(tmp_path: Path, caplog, damage):
    get_or_build(str(tmp_path), "set valid", KEY, lambda: [some_rows()])
    damage(entries(tmp_path)[0])
    rows = get_or_build(str(tmp_path), "set valid", KEY, lambda: [some_rows()])
    assert rows.ids.tolist() == [[7] * 4] * 3 and rows.lengths.tolist() == [4] * 3
    assert "is corrupt" in caplog.text


def test_one_builds_while_the_others_wait(tmp_path: Path):
    built = []

    def slowly() -> Iterator[Rows]:
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


def test_failure_leaves_nothing_and_the_next_attempt_succeeds(tmp_path: Path):
    def broken() -> Iterator[Rows]:
        yield some_rows()
        raise ValueError("line 7 of the data is broken")

    with pytest.raises(ValueError, match="line 7"):
        get_or_build(str(tmp_path), "set", KEY, broken)
    assert entries(tmp_path) == []
    assert len(get_or_build(str(tmp_path), "set", KEY, lambda: [some_rows()]).ids) == 3


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path):
    entry = row_cache.entry_path(str(tmp_path), "set", {"format": 1} | KEY)
    leftover = tmp_path / f"{entry.name}.tmp-x"
    leftover.mkdir()
    get_or_build(str(tmp_path), "set", KEY, lambda: [some_rows()])
    assert entries(tmp_path) == [entry]


def test_unwritable_cache(local_config, tmp_path: Path):
    (tmp_path / "occupied").write_text("a file, not a directory")
    config = local_config(f"data.cache_dir={tmp_path}/occupied/cache")
    with pytest.raises(OSError, match="data.cache_dir: cannot write .*occupied.*writable"):
        get_dataloaders(data_request(config), get_tokenizer(data_request(config)), skip_train=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a full disk of Linux")
def test_full_disk(tmp_path: Path, monkeypatch):
    """Writing fails with ENOSPC, as on a full disk; the message says so and nothing is left."""
    write = row_cache._write

    def write_to_full_disk(folder: Path, key, batches) -> str:
        (folder / "ids.int32").symlink_to("/dev/full")
        return write(folder, key, batches)

    monkeypatch.setattr(row_cache, "_write", write_to_full_disk)
    with pytest.raises(OSError, match="data.cache_dir: .*No space left.*Nothing half") as caught:
        get_or_build(str(tmp_path), "set", KEY, lambda: [some_rows()])
    assert caught.value.errno == errno.ENOSPC
    assert entries(tmp_path) == []


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
