"""A run that goes on from any of its checkpoints ends as one that was never stopped."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from checkpointing.checkpoint_io import AtomicCheckpointIO
from tests.helpers.killable_runs import assert_same_training
from tests.helpers.small_run import ALGOS

# 354 rows: epochs of four global batches of 88 rows, and two rows that are left out.
EPOCHS = ["loader.global_batch_size=88", "loader.eval_global_batch_size=4",
          "trainer.limit_val_batches=1", "trainer.max_steps=6",
          "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]  # fmt: skip
BD3LM = [*ALGOS["bd3lm"], "training.resample=true"]

CASES = {
    # Validation falls amid an accumulation, on the end of one, and on the last step.
    "accumulation": [*BD3LM, *EPOCHS, "loader.batch_size=44", "trainer.val_check_interval=3"],
    "end of epoch": [*BD3LM, *EPOCHS, "trainer.val_check_interval=4", "trainer.max_steps=8"],
    "fraction of an epoch": [*BD3LM, *EPOCHS, "trainer.val_check_interval=0.5"],
    "short epochs": ["algo=mdlm", *EPOCHS, "trainer.limit_train_batches=3"],
    "workers": ["algo=mdlm", *EPOCHS, "loader.num_workers=2", "loader.batch_size=44"],
    "sparse": [*BD3LM, *EPOCHS, "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
               "trainer.val_check_interval=3"],  # fmt: skip
    "stream": ["algo=ar", "data.streaming=true", "data.shuffle_buffer=8", "trainer.max_steps=5"],
    "end of stream": ["algo=mdlm", *EPOCHS, "data.streaming=true", "data.shuffle_buffer=30"],
    "stream workers": ["algo=mdlm", "data.streaming=true", "data.shuffle_buffer=8",
                       "loader.num_workers=2", "trainer.max_steps=5"],
}  # fmt: skip
SLOW = {"workers", "stream workers", "end of epoch", "end of stream", "fraction of an epoch"}


@pytest.fixture
def run(run_main):
    """Trains in a folder of its own; returns the final checkpoint and the rows of the log."""

    def run_in(name: str, *changes: str) -> tuple[dict | None, list[dict]]:
        folder = run_main(name, *changes)
        if not (folder / "checkpoints/last.ckpt").exists():  # it had been at its end
            return None, []
        with (folder / "metrics/version_0/metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return torch.load(folder / "checkpoints/last.ckpt", weights_only=True), rows

    return run_in


@pytest.fixture
def collect(tmp_path, monkeypatch):
    """Keeps a copy of every state of last.ckpt: `collect()` returns them."""
    copies: list[Path] = []
    save, link = AtomicCheckpointIO.save_checkpoint, AtomicCheckpointIO.link

    def link_and_copy(self, path, name):
        is_linked = link(self, path, name)
        if is_linked:
            step = torch.load(name, weights_only=True)["global_step"]
            copies.append(tmp_path / f"copy{len(copies)}-step{step}.ckpt")
            shutil.copy(name, copies[-1])
        return is_linked

    def save_and_copy(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path, storage_options)
        if Path(path).name == "last.ckpt":
            copies.append(tmp_path / f"copy{len(copies)}-step{checkpoint['global_step']}.ckpt")
            shutil.copy(path, copies[-1])

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_copy)
    monkeypatch.setattr(AtomicCheckpointIO, "link", link_and_copy)

    def collected() -> list[Path]:
        monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
        monkeypatch.setattr(AtomicCheckpointIO, "link", link)
        return copies

    return collected


def logged(rows: list[dict]) -> dict[tuple[str, int], tuple[float, str]]:
    """Name and step -> value and epoch; what depends on the clock is left out."""
    return {
        (name, int(row["step"])): (float(value), row["epoch"])
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "epoch") and "second" not in name
    }


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def test_every_checkpoint_leads_to_the_same_end(case, run, collect):
    """Weights, average, optimizer, schedule, clipped range, position and metrics, bit by bit.

    Dropout is 0.1. Lost were: a validation that was due when the checkpoint was written, and the
    range that it found; the mean over an epoch; the gradients of a checkpoint that was written
    amid an accumulation; with loading processes, the order of the rows of a second epoch; of a
    stream, a batch and the rows in the shuffle buffer.
    """
    straight, straight_rows = run("straight", *CASES[case])
    expected = logged(straight_rows)
    copies = collect()
    assert len(copies) > 4
    for copy in copies:
        resumed, rows = run(copy.stem, *CASES[case], f"checkpointing.resume_ckpt_path={copy}")
        begun = torch.load(copy, weights_only=True)
        step, is_due = begun["global_step"], begun["resume"]["validation_is_due"]
        assert_same_training(straight, resumed or begun)
        found = logged(rows)
        assert found.items() <= expected.items(), copy.stem
        assert not {key for key in expected if key[1] >= step} - found.keys(), copy.stem
        assert not is_due or ("val/nll", step - 1) in found, copy.stem
