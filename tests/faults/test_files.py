"""Files that are damaged, disks that are full or read-only, clocks that are set back."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.killable_runs import Run, assert_same_training
from tests.helpers.small_run import ALGOS

EVERY_STEP = "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"
DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "of length zero": lambda content: b"",
    "garbage": lambda content: os.urandom(len(content)),
    "one bit changed": lambda content: content[:90_000] + bytes([content[90_000] ^ 1])
    + content[90_001:],
}  # fmt: skip


@pytest.fixture
def mount(tmp_path):
    """Mounts small file systems: `mount("name", "size=3m")`; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount_tmpfs(name: str, options: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(folder)
        return folder

    yield mount_tmpfs
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.slow
def test_the_newest_checkpoint_is_damaged(tmp_path, straight, count):
    """The one before it is taken, with a warning; the end is the same."""
    changes = [*ALGOS["bd3lm"], EVERY_STEP, "trainer.max_steps=6"]
    expected = straight(*changes)
    for damage, change in DAMAGES.items():
        run = Run(tmp_path / damage.replace(" ", "-"), *changes)
        run.run("trainer.max_steps=4")
        for name in ("last.ckpt", "0-4.ckpt"):
            path = run.checkpoints / name
            damaged = change(path.read_bytes())
            path.unlink()  # or both might be names of one file, which would be changed twice
            path.write_bytes(damaged)
        output = run.run()
        assert output.count("is damaged") == 2 and "from the checkpoint" in output
        assert "0-3.ckpt" in output
        assert_same_training(expected, run.last())
        count(f"the newest checkpoint is {damage}")


@pytest.mark.slow
def test_the_disk_is_full(tmp_path, straight, mount, count):
    """Training goes on, older checkpoints stay whole, and the exit status tells."""
    changes = ["algo=mdlm", EVERY_STEP, "trainer.max_steps=4"]
    run = Run(tmp_path, *changes)
    run.run("trainer.max_steps=1")
    size = (run.checkpoints / "last.ckpt").stat().st_size
    for path in run.checkpoints.iterdir():
        path.unlink()
    folder = mount("kept", f"size={int(2.6 * size) // 1024}k")
    output = run.run(expected=1)
    assert "No space left on device" in output and "training goes on" in output
    assert torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"] >= 1
    assert not list(run.checkpoints.glob("*.partial"))
    remount(folder, "size=100m")
    run.run()
    assert_same_training(straight(*changes), run.last())
    count("the disk is full during a save")


@pytest.mark.slow
def test_the_cache_is_read_only(tmp_path, mount, count):
    """What lies in it is used; what would have to be written is a one-line error."""
    run = Run(tmp_path, "algo=mdlm", "trainer.max_steps=1")
    cache = mount("cache", "size=50m")
    run.run()
    remount(cache, "ro")
    run.run("checkpointing.save_dir=again")
    output = run.run("model.length=16", "checkpointing.save_dir=other", expected=1)
    assert "data.cache_dir: cannot write" in output and "Traceback" not in output
    remount(cache, "rw")
    run.run("model.length=16", "checkpointing.save_dir=other")
    count("the cache is read-only")


@pytest.mark.slow
def test_two_jobs_build_the_same_cache(tmp_path, count):
    """One builds while the other waits, and both train."""
    jobs = [Run(tmp_path, "algo=ar", "trainer.max_steps=1") for _ in range(2)]
    processes = [
        job.start(f"checkpointing.save_dir={tmp_path}/{i}", f"hydra.run.dir={tmp_path}/out{i}")
        for i, job in enumerate(jobs)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("354 rows of 32" in output for output in outputs) == 1
    count("two jobs build the same cache at once")


@pytest.mark.slow
def test_a_cache_file_is_corrupt(tmp_path, straight, count):
    changes = ["algo=mdlm", "trainer.max_steps=2"]
    run = Run(tmp_path, *changes)
    run.run("trainer.max_steps=1")
    (ids,) = (tmp_path / "cache/rows").glob("local_train-*/ids.uint16")
    content = ids.read_bytes()
    ids.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert "is corrupt" in run.run()
    assert_same_training(straight(*changes), run.last())
    count("a corrupt cache file")


@pytest.mark.slow
def test_the_clock_goes_back(tmp_path, straight, count):
    """A year back between two starts, and an hour with each question during the second."""
    changes = [*ALGOS["bd3lm"], EVERY_STEP, "trainer.max_steps=5"]
    run = Run(tmp_path, *changes)
    run.run("trainer.max_steps=4")
    for age, path in enumerate(sorted(run.checkpoints.iterdir())):
        os.utime(path, (1e9 - age, 1e9 - age))
    (run.checkpoints / "last.ckpt").unlink()
    run.run(preparation="""
now, asked = time.time, 0
def backwards():
    global asked
    asked += 1
    return now() - 365 * 86400 - 3600 * asked
time.time = backwards
""")
    assert_same_training(straight(*changes), run.last())
    count("the clock moves back")


@pytest.mark.slow
def test_pairs_started_together(tmp_path, count, repeats):
    """In one directory of the same second, one of them died or took the other's checkpoints."""
    kept, num_pairs = 0, repeats(20, in_suite=2)
    for number in range(num_pairs):
        pair = Run(tmp_path, "algo=ar", "checkpointing.save_dir=${cwd:}",
                   f"hydra.run.dir=${{claimed:{tmp_path}/out/{number}}}")  # fmt: skip
        processes = {seed: pair.start(f"seed={seed}") for seed in (1, 2)}
        seen = set()
        for seed, process in processes.items():
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
            run = Path(re.search(r"Everything is in (\S+)", output)[1])
            checkpoints = list((run / "checkpoints").glob("*.ckpt"))
            configs = [torch.load(path, weights_only=True)["hyper_parameters"]["config"]
                       for path in checkpoints]  # fmt: skip
            manifest = json.loads((run / "manifest.json").read_text())
            assert len(checkpoints) >= 2
            assert {config["seed"] for config in [*configs, manifest["config"]]} == {seed}
            assert len(manifest["history"]) == 1
            seen.add(run)
            kept += 1
        assert len(seen) == 2
    count("two runs start in the same second, in pairs", tried=2 * num_pairs, survived=kept)


@pytest.mark.slow
def test_a_second_training_in_the_same_directory(tmp_path, count):
    run = Run(tmp_path, "algo=ar", "trainer.max_steps=100000")
    first = run.start()
    while not (run.checkpoints / "last.ckpt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    output = run.run(expected=1)
    assert f"process {first.pid} on" in output and "Traceback" not in output
    first.terminate()
    first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM
    run.run(f"trainer.max_steps={run.last()['global_step'] + 1}")
    count("a second training in the directory of one that runs")
