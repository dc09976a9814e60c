"""Two runs never share a directory; the processes of one do."""

import multiprocessing
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from configuration.resolvers import register_resolvers
from configuration.run_directory import MARK, claim_directory

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def claim_many(folder: str) -> list[str]:
    return [claim_directory(f"{folder}/{name}") for name in range(20)]


def test_processes_that_claim_at_once_get_directories_of_their_own(tmp_path, monkeypatch):
    """Two of them used to share the directory of a second, and its checkpoints."""
    monkeypatch.setattr(os, "getpid", lambda: 7)  # no process may be told by its number alone
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        claimed = list(pool.map(claim_many, [str(tmp_path)] * 4))
    paths = [path for of_process in claimed for path in of_process]
    assert sorted(set(paths)) == sorted(paths) == sorted(map(str, tmp_path.iterdir()))
    assert {Path(path).name.partition("-")[2] for path in paths} == {"", "2", "3", "4"}


def test_it_is_an_ordinary_directory(tmp_path):
    path = Path(claim_directory(f"{tmp_path}/a/b"))
    (tmp_path / "c").mkdir()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "c").stat().st_mode)
    assert [file.name for file in path.iterdir()] == [MARK]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        claim_directory(f"{tmp_path}/file/a")


@pytest.mark.parametrize(
    "launch",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"},
    ],
)
def test_the_processes_of_a_launch_share_one(launch, tmp_path, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    claim_directory(f"{tmp_path}/run")
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    first = claim_directory(f"{tmp_path}/run")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert claim_directory(f"{tmp_path}/run") == first == f"{tmp_path}/run-2"
    for name in ("SLURM_STEP_ID", "MASTER_PORT"):
        monkeypatch.setenv(name, "9")
    monkeypatch.setattr(os, "getppid", lambda: 8)
    assert claim_directory(f"{tmp_path}/run") == f"{tmp_path}/run-3"


@pytest.mark.parametrize("key", ["run", "sweep"])
def test_a_configuration_claims_once(key, tmp_path, monkeypatch):
    register_resolvers()
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        configs = [compose("config", return_hydra_config=True) for _ in range(2)]
    names = [[config.hydra[key].dir for _ in range(2)] for config in configs]
    assert [len(set(of_one)) for of_one in names] == [1, 1] and names[0] != names[1]
    assert all(Path(of_one[0]).is_dir() for of_one in names)
