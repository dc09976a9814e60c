"""The manifest of a run."""

import json
import subprocess

import pytest
import torch

import main
from configuration.training_request import plain
from corpora.row_cache import CachedRows
from corpora.row_datasets import PackedRows
from tests.helpers.small_run import ALGOS, overrides, write_text
from training import manifest


@pytest.fixture
def start(compose, tmp_path, monkeypatch):
    """Starts main in `tmp_path/run` and returns the manifest."""
    write_text(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*changes: str) -> dict:
        main.run(compose(overrides(tmp_path, *ALGOS["ar"], *changes)), launch_dir=str(tmp_path))
        return json.loads((folder / "manifest.json").read_text())

    return run


def test_the_manifest_tells_what_a_run_was_made_of(start, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = start("trainer.max_steps=2")
    # Whether a package names its build, as in 2.11.0+cu130, depends on where it came from.
    assert first["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert first["config"]["trainer"]["max_steps"] == 2 and first["world_size"] == 1
    assert first["git_commit"] == manifest.git_commit()
    rows = first["data"]
    assert rows["train"]["rows"] > rows["valid"]["rows"] > 0
    assert len(rows["train"]["sha256"]) == 64 and rows["train"] != rows["valid"]
    (only,) = first["history"]
    assert (only["step"], only["slurm_job"], only["config_hash"]) == (0, "17", first["config_hash"])


def test_each_start_adds_to_the_history(start):
    """The run is resumed in its directory; what changed between two starts shows."""
    start("trainer.max_steps=2")
    second = start("trainer.max_steps=4")
    assert [entry["step"] for entry in second["history"]] == [0, 2]
    before, after = second["history"]
    assert before["config_hash"] != after["config_hash"] == second["config_hash"]
    assert second["config"]["trainer"]["max_steps"] == 4


def test_the_hash_follows_the_configuration(compose, tmp_path):
    one, same, other = (
        manifest.config_hash(plain(compose(overrides(tmp_path, f"seed={seed}"))))
        for seed in (1, 1, 2)
    )
    assert one == same != other and len(one) == 16


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    """A changed file makes it `-dirty`; outside a checkout there is none."""
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "training/manifest.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest.git_commit() is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    (tmp_path / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    commit = manifest.git_commit()
    assert len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert manifest.git_commit() == f"{commit}-dirty"


def test_a_stream_has_no_hash():
    rows = CachedRows(ids=torch.zeros(2, 4).numpy(), lengths=torch.zeros(2).numpy(), sha256="ab")
    loader = torch.utils.data.DataLoader(PackedRows(rows))
    assert manifest.describe_rows(loader) == {"rows": 2, "sha256": "ab"}
    assert manifest.describe_rows(torch.utils.data.DataLoader([1])) is None
    assert manifest.describe_rows(None) is None


@pytest.mark.parametrize("content", ["", "[]", '{"history": 1}', '{"history"', "\udcff"])
def test_a_damaged_manifest_stops_no_training(content, tmp_path, caplog):
    """It is for people to read, and kept a training that went on from beginning."""
    path = tmp_path / "manifest.json"
    path.write_text(content, errors="surrogateescape")
    assert manifest.RunManifest(str(path), {})._history() == []
    assert "manifest.json is damaged" in caplog.text
