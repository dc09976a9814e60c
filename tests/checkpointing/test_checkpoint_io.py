"""Checkpoint files: whole or not there, on local disks and elsewhere; which one is taken."""

import logging
import os

import fsspec
import pytest
import torch

import main
from checkpointing import checkpoint_io
from checkpointing.checkpoint_io import AtomicCheckpointIO
from tests.helpers.killable_runs import assert_same_training
from tests.helpers.small_run import overrides, write_text
from training.resume import newest_whole_checkpoint


@pytest.fixture
def memory():
    """fsspec's file system in memory, a stand-in for object stores; empty."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def write(folder: str, *names: str) -> None:
    for name in names:
        checkpoint = {"name": name, "x": torch.arange(99)}
        AtomicCheckpointIO().save_checkpoint(checkpoint, f"{folder}/{name}")


@pytest.mark.parametrize("place", ["file://", "memory://", ""])
def test_written_whole_under_its_name(place, tmp_path, memory):
    folder = f"{place}{tmp_path}/deep/er"
    write(folder, "last.ckpt", "last.ckpt", "0-5.ckpt")
    fs, name = fsspec.core.url_to_fs(folder)
    assert sorted(path.rsplit("/", 1)[1] for path in fs.ls(name, detail=False)) == [
        "0-5.ckpt", "last.ckpt",
    ]  # fmt: skip
    with fsspec.open(f"{folder}/last.ckpt", "rb") as file:
        assert torch.load(file, weights_only=True)["name"] == "last.ckpt"
    assert newest_whole_checkpoint(folder) == f"{folder}/last.ckpt"


def test_synced_before_it_is_renamed(tmp_path, monkeypatch):
    """Without it a file may have its name, but no content, after a power cut."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (done.append(n), f(*a)))
    write(str(tmp_path), "last.ckpt")
    assert done == ["fsync", "replace", "fsync"], "the file, its name, the directory"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, caplog):
    write(str(tmp_path), "last.ckpt")
    before = (tmp_path / "last.ckpt").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    checkpoint_io = AtomicCheckpointIO()
    with caplog.at_level(logging.ERROR):
        checkpoint_io.save_checkpoint({"name": "new"}, tmp_path / "last.ckpt")
    assert "No space left" in caplog.text and "training goes on" in caplog.text
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(OSError, match="last.ckpt: cannot be written"):
        checkpoint_io.raise_if_last_failed()
    monkeypatch.undo()
    checkpoint_io.save_checkpoint({"name": "new"}, tmp_path / "last.ckpt")
    checkpoint_io.raise_if_last_failed()


def cut(path: str, *, to: int) -> None:
    fs, name = fsspec.core.url_to_fs(path)
    fs.pipe_file(name, fs.cat_file(name)[:to])


@pytest.mark.parametrize("place", ["memory://", ""])
def test_damaged_files_are_skipped_by_step(place, tmp_path, memory, caplog):
    """By the step in the name: files written after a clock was set back look older."""
    folder = f"{place}{tmp_path}/checkpoints"
    assert newest_whole_checkpoint(folder) is None
    write(folder, "1-1000.ckpt", "0-900.ckpt", "1-20000.ckpt", "best.ckpt", "last.ckpt")
    expected = ["last.ckpt", "1-20000.ckpt", "1-1000.ckpt", "0-900.ckpt"]
    for i, name in enumerate(expected):
        assert newest_whole_checkpoint(folder) == f"{folder}/{name}"
        cut(f"{folder}/{name}", to=(0, 200, 1500, 10)[i])
    assert f"{folder}/last.ckpt is damaged" in caplog.text
    with pytest.raises(ValueError, match="all checkpoints are damaged.*resume_from_ckpt=false"):
        newest_whole_checkpoint(folder)


def train(compose, tmp_path, monkeypatch, name: str, *changes: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    main.run(compose(overrides(tmp_path, "algo=mdlm", *changes)), launch_dir=str(tmp_path))


@pytest.mark.parametrize("place", ["memory://", "file://"])
def test_a_run_on_another_file_system_resumes(place, compose, tmp_path, monkeypatch, memory):
    """Checkpoints at URLs are written, found again by the next start, and kept to their number."""
    write_text(tmp_path)
    save_dir = f"checkpointing.save_dir={place}{tmp_path}/kept"
    every = "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"
    train(compose, tmp_path, monkeypatch, "first", save_dir, every, "trainer.max_steps=3")
    train(compose, tmp_path, monkeypatch, "second", save_dir, every, "trainer.max_steps=6")
    train(compose, tmp_path, monkeypatch, "straight", every, "trainer.max_steps=6")
    fs, kept = fsspec.core.url_to_fs(f"{place}{tmp_path}/kept/checkpoints")
    files = {path.rsplit("/", 1)[1] for path in fs.ls(kept, detail=False)}
    assert files == {"last.ckpt", "best.ckpt", "0-4.ckpt", "0-5.ckpt", "0-6.ckpt"}
    with fs.open(f"{kept}/last.ckpt", "rb") as file:
        resumed = torch.load(file, weights_only=True)
    straight = torch.load(tmp_path / "straight/checkpoints/last.ckpt", weights_only=True)
    assert_same_training(straight, resumed)


def content(path) -> str:
    return torch.load(path, weights_only=True)["name"]


def test_a_second_name_is_whole_whenever_the_process_is_killed(tmp_path, monkeypatch):
    """Before and after each of its calls, and again by a process of the same number."""
    for call in ("link", "replace"):
        for is_done in (False, True):
            folder = tmp_path / f"{call}-{is_done}"
            write(str(folder), "last.ckpt", "0-5.ckpt")
            original = getattr(os, call)

            def kill(*args, original=original, is_done=is_done):
                if is_done:
                    original(*args)
                raise SystemExit

            with monkeypatch.context() as patch:
                patch.setattr(os, call, kill)
                patch.setattr(checkpoint_io, "_remove", lambda _name: None)  # it is dead by then
                with pytest.raises(SystemExit):
                    AtomicCheckpointIO().link(f"{folder}/0-5.ckpt", f"{folder}/last.ckpt")
            is_new = call == "replace" and is_done
            assert content(folder / "last.ckpt") == ("0-5.ckpt" if is_new else "last.ckpt")
            write(str(folder), "last.ckpt")  # not through a name that is left over
            assert content(folder / "0-5.ckpt") == "0-5.ckpt"
            assert content(folder / "last.ckpt") == "last.ckpt"


def test_a_second_name_takes_the_place_of_the_old(tmp_path):
    """Also of itself, where renaming does nothing and says nothing."""
    write(str(tmp_path), "last.ckpt", "0-5.ckpt")
    files = AtomicCheckpointIO()
    for _ in range(2):
        assert files.link(f"{tmp_path}/0-5.ckpt", f"{tmp_path}/last.ckpt")
        assert (tmp_path / "last.ckpt").samefile(tmp_path / "0-5.ckpt")
        assert sorted(os.listdir(tmp_path)) == ["0-5.ckpt", "last.ckpt"]
    write(str(tmp_path), "0-5.ckpt")
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "0-5.ckpt"), "a new file, not in place"


def test_a_file_that_was_not_written_gets_no_second_name(tmp_path, memory):
    """An older one may bear the name; and object stores know no links."""
    write(str(tmp_path), "last.ckpt", "0-5.ckpt")
    files = AtomicCheckpointIO()
    files.failures[f"{tmp_path}/0-5.ckpt"] = "the disk is full"
    assert not files.link(f"{tmp_path}/0-5.ckpt", f"{tmp_path}/last.ckpt")
    assert content(tmp_path / "last.ckpt") == "last.ckpt"
    assert not AtomicCheckpointIO().link(f"{tmp_path}/no.ckpt", f"{tmp_path}/last.ckpt")
    write("memory://kept", "0-5.ckpt")
    assert not AtomicCheckpointIO().link("memory://kept/0-5.ckpt", "memory://kept/last.ckpt")
