"""What the evaluation modes write (the whole path is in test_end_to_end.py)."""

import csv
import errno

import pytest
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.utilities import rank_zero_only

import evaluation
from evaluation import _append_samples, config_hash, sample_eval
from tests.small_run import overrides

ROW = {"gen_nfes": 3, "gen_entropy": 1.5, "gen_lengths": 4, "seed": 1}


def texts(path: str) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        return [row["samples"] for row in csv.DictReader(file)]


def test_samples_survive_commas_quotes_and_line_breaks(tmp_path):
    """And are never evaluated: the original called eval on the cells."""
    awkward = ['a "quoted", cell', "two\nlines\r\nthree", "__import__('os')", "ü – 漢"]
    for text in awkward:
        path = _append_samples(str(tmp_path / "new"), [ROW | {"samples": text}])
    assert texts(path) == awkward


def test_a_full_disk_keeps_the_samples_that_were_there(tmp_path, monkeypatch):
    path = _append_samples(str(tmp_path), [ROW | {"samples": "old"}])

    def disk_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "mv", disk_full)
    with pytest.raises(OSError, match="samples.csv: cannot be written"):
        _append_samples(str(tmp_path), [ROW | {"samples": "new"}])
    assert texts(path) == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.csv"]


def test_one_process_samples(compose, tmp_path, monkeypatch):
    """Under srun every process drew the same samples and wrote them to the same file."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(evaluation, "get_tokenizer", None)  # calling it would fail
    assert sample_eval(compose(overrides(tmp_path, "mode=sample_eval"))) is None


def test_hash_follows_the_configuration(compose, tmp_path):
    one, same, other = (
        config_hash(compose(overrides(tmp_path, f"seed={seed}"))) for seed in (1, 1, 2)
    )
    assert one == same != other and len(one) == 16
