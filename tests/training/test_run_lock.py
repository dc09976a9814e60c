"""One training at a time in a directory."""

import os
import signal
import time
from pathlib import Path

import pytest

from training import run_lock
from training.run_lock import LOCK, only_training_in


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another process that trains in `tmp_path`, as the given Slurm job."""
    monkeypatch.setattr(run_lock, "_LEAVING", 0.2)
    monkeypatch.setattr(run_lock, "_NODE_LOST", 0.2)
    pids = []

    def start(seconds: float = 60, **environment: str) -> int:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            with only_training_in(str(tmp_path)):
                os.write(writing, b"x")
                time.sleep(seconds)
            os._exit(0)
        os.read(reading, 1)
        pids.append(pid)
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_training_is_refused_and_a_killed_one_is_not_in_the_way(elsewhere, tmp_path):
    pid = elsewhere()
    with pytest.raises(ValueError, match=f"save_dir=.*: process {pid} on .* is training there"):
        with only_training_in(str(tmp_path)):
            pass
    os.kill(pid, signal.SIGKILL)
    with only_training_in(str(tmp_path)), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        with only_training_in(str(tmp_path)):
            pass


def test_one_that_is_about_to_end_is_waited_for(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_LEAVING", 10)
    elsewhere(seconds=0.3)
    with only_training_in(str(tmp_path)):
        pass


def test_a_requeued_job_gets_past_its_lost_node(elsewhere, tmp_path, monkeypatch):
    """Where the file system does not notice that a node died; another job is refused as ever."""
    elsewhere(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
    for job, restarts in (("13", "2"), ("12", "1")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(ValueError, match="Slurm job 12 after 1 restarts is training"):
            with only_training_in(str(tmp_path)):
                pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with only_training_in(str(tmp_path)):
        pass


def test_other_processes_of_the_run_and_object_stores_need_no_lock(
    elsewhere, tmp_path, monkeypatch
):
    elsewhere()
    with only_training_in("s3://bucket/run"):
        pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with only_training_in(str(tmp_path)):
        pass


def test_half_written_checkpoints_of_killed_trainings_are_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt", "last.ckpt.node-12.partial", "0-4.ckpt.partial", "notes.partial"):
        (folder / name).touch()
    with only_training_in(str(tmp_path)):
        assert {file.name for file in folder.iterdir()} == {"last.ckpt", "notes.partial"}
    assert Path(tmp_path, LOCK).exists()
