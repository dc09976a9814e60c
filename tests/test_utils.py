"""Seeds, files, the cosine schedule, the logger."""

import errno
import fcntl
import io
import json
import logging
import math
import os
import signal
import sys
import time

import filelock
import pytest
import rich.console
import rich.panel
import rich.text
import torch
from fsspec.implementations.local import LocalFileSystem

from utils import (
    absolute_path,
    derive_seed,
    file_exists,
    file_lock,
    get_logger,
    json_text,
    lock_holder,
    made_current,
    print_without_fail,
    process_rank,
    resolve_device,
    write_text,
)


def test_seeds_are_distinct_and_repeat():
    seeds = {derive_seed(1, stream, rank, n) for stream in (0, 1) for rank in (0, 1)
             for n in range(50)}  # fmt: skip
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) != derive_seed(3, 2, 1)


def test_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute_path("a/b", base="/x") == absolute_path("../a/b/", base="/x/y") == "/x/a/b"
    assert absolute_path("a") == f"{tmp_path}/a" and absolute_path("~/a") == "/home/someone/a"
    assert absolute_path("/a", base="/x") == "/a"
    assert absolute_path("gs://a/b", base="/x") == "gs://a/b"
    assert absolute_path("file:///a", base="/x") == absolute_path("local:///a", base="/x") == "/a"


def test_file_exists_takes_files_directories_and_urls(tmp_path):
    (tmp_path / "f").touch()
    assert file_exists(str(tmp_path)) and file_exists(f"file://{tmp_path}/f")
    assert not file_exists(str(tmp_path / "g"))


def test_write_text_makes_directories_and_replaces(tmp_path):
    path = tmp_path / "a/b/out.json"
    write_text(str(path), "one\n")
    write_text(str(path), "zwei ü\r\n")
    assert path.read_bytes() == "zwei ü\r\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_processes_that_write_one_file_do_not_write_into_each_others(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(LocalFileSystem, "mv", lambda fs, old, new: moved.append(old))
    path = str(tmp_path / "out.json")
    write_text(path, "one")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    write_text(path, "two")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    write_text(path, "three")
    assert len(set(moved)) == 3


def no_flock(*args):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_killed_process_leaves_no_lock(has_flock, tmp_path, monkeypatch):
    if not has_flock:  # as on Lustre mounted without it
        monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / "a.lock"
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with file_lock(path):
            if os.fork() == 0:  # a loading process, which may outlive the one that has the lock
                time.sleep(3)
                os._exit(0)
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    with pytest.raises(filelock.Timeout), file_lock(path, timeout=0):
        pass
    assert lock_holder(path).startswith(f"process {holder} on ")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with file_lock(path, timeout=1):
        assert lock_holder(path).startswith(f"process {os.getpid()} on ")
    with file_lock(path, timeout=0):
        pass


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), file_lock(tmp_path / "file/a.lock"):
        pass


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["mv", "write"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(where, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    write_text(str(path), "old")
    if where == "mv":
        monkeypatch.setattr(LocalFileSystem, "mv", disk_full)
    else:
        opened = LocalFileSystem.open

        def open_on_full_disk(self, name, mode="rb", **kwargs):
            file = opened(self, name, mode, **kwargs)
            file.write = disk_full
            return file

        monkeypatch.setattr(LocalFileSystem, "open", open_on_full_disk)
    with pytest.raises(OSError, match=r"out.json: cannot be written \(.*No space left"):
        write_text(str(path), "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out.json: cannot be written"):
        write_text(str(tmp_path / "file/out.json"), "text")


def test_other_processes_are_silent(monkeypatch, caplog):
    logger = get_logger("tests.rank")
    caplog.set_level(logging.INFO)
    logger.info("from the first")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    logger.info("from the second")
    assert [r.getMessage() for r in caplog.records] == ["from the first"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8"}, (2, 8)),
        ({"SLURM_PROCID": "2"}, (0, 1)),  # a shell of salloc: no step, one process
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0",
          "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
    ],
    ids=["alone", "torchrun", "srun", "salloc", "launched in a shell of srun"],
)  # fmt: skip
def test_rank_before_there_is_a_process_group(environment, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process_rank() == expected


def test_device_of_a_machine_without_gpu(fake_gpus):
    fake_gpus(0)
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("local_rank", "expected"), [("0", "cuda:0"), ("3", "cuda:3"), ("5", "cuda:1")]
)
def test_the_device_of_a_process_is_its_current_one(fake_gpus, monkeypatch, local_rank, expected):
    """Under torchrun all processes recorded their CUDA graphs on the first GPU, whose tensors
    were on another one, and wrote wrong texts."""
    fake_gpus(4)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert str(resolve_device("auto")) == expected and current == [expected]
    made_current(torch.device("cpu")), made_current(torch.device("cuda"))
    assert current == [expected]


def test_json_is_valid_whatever_the_numbers():
    """ppl_eval.json held `Infinity`, which is no JSON."""
    value = {"ppl": math.inf, "rows": [{"nll": math.nan}, (1, -math.inf, 2.5)], "n": 3, "s": "NaN"}
    found = json.loads(json_text(value, indent=2), parse_constant=pytest.fail)
    assert found == {"ppl": None, "rows": [{"nll": None}, [1, None, 2.5]], "n": 3, "s": "NaN"}


@pytest.fixture
def stdout(monkeypatch):
    """Standard output with an encoding, into a pipe or a file: `stdout("ascii")`, its other end."""
    files = []

    def redirect(encoding: str):
        end, start = os.pipe()
        files.extend([os.fdopen(end, "rb"), os.fdopen(start, "wb")])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(files[1], encoding=encoding))
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        files.append(sys.stdout)  # as sys.__stdout__ is kept
        print_without_fail()
        return files[0]

    yield redirect
    for file in files:
        file.close()


@pytest.mark.parametrize(("encoding", "seen"), [("ascii", b"??x?"), ("latin-1", b"??x\xe9")])
def test_a_terminal_without_the_letters_shows_others(stdout, encoding, seen):
    """The first sample that held one ended the run, and the others were never drawn."""
    pipe = stdout(encoding)
    print("日本xé")
    sys.stdout.close()
    assert pipe.read() == seen + b"\n"


def test_tables_for_a_terminal_without_line_drawing(stdout):
    pipe = stdout("ascii")
    rich.console.Console().print(rich.panel.Panel(rich.text.Text("日 text"), title="sample 1"))
    sys.stdout.close()
    frame = pipe.read().decode("ascii").splitlines()
    assert frame[0].startswith("+--") and " sample 1 " in frame[0] and "|" in frame[1]


def test_nobody_reads_on(stdout):
    """`| head` ended a run at its first print behind, in the middle of its samples."""
    stdout("utf-8").close()
    for _ in range(3):
        print("x" * 100_000)
        rich.console.Console().print("sample")
    sys.stdout.flush()


def test_a_log_on_a_full_disk(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print_without_fail()
        print("lost")
        sys.stdout.flush()
        monkeypatch.undo()


def test_output_that_is_no_file_stays(monkeypatch):
    """Notebooks and tests have such, and Windows without a terminal has none."""
    monkeypatch.setattr(sys, "stderr", None)
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        print_without_fail()
        assert sys.stdout is stream
