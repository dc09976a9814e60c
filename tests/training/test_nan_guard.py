"""A loss that is no number: the training stops, nothing is saved of it, the batch is."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.places import PROJECT
from tests.helpers.small_module import batches, module, trainer
from tests.helpers.small_run import ALGOS, overrides, write_text
from training.nan_guard import NanGuard, NonFiniteLossError


@pytest.fixture
def build(compose, tmp_path):
    return lambda: module(compose, tmp_path, *ALGOS["bd3lm"])


def spoil(model, *, batch_number: int, value: float) -> None:
    """Makes the loss of one batch of the training a given number."""
    losses = model.token_losses

    def spoiled(x_0, **arguments):
        is_it = model.trainer.training and model.trainer.fit_loop.total_batch_idx == batch_number
        return losses(x_0, **arguments) * (value if is_it else 1.0)

    model.token_losses = spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_and_keeps_the_batch(value, build, tmp_path):
    """Found at the next logged step; the kept batch is the first bad one, not what followed."""
    model = build()
    spoil(model, batch_number=5, value=value)
    run, _ = trainer(
        tmp_path, callbacks=[NanGuard(str(tmp_path))], steps=100, log_every_n_steps=4,
        val_check_interval=100,
    )  # fmt: skip
    data = batches(40)
    message = "batch 5 of process 0, before step 8.*nonfinite_rank0.pt"
    with pytest.raises(NonFiniteLossError, match=message):
        run.fit(model, data, batches(1, seed=1))
    kept = torch.load(tmp_path / "nonfinite_rank0.pt", weights_only=True)
    rows = list(data)
    assert torch.equal(kept["input_ids"], rows[5]["input_ids"])
    assert torch.equal(kept["previous_input_ids"], rows[4]["input_ids"])
    assert kept["batch_number"] == 5 and (kept["seed"], kept["rank"]) == (1, 0)
    assert not torch.isfinite(kept["loss"])


def test_no_checkpoint_is_written_of_it(build, tmp_path):
    """Between two logged steps too: the flag is read before anything is saved."""
    model = build()
    spoil(model, batch_number=2, value=float("nan"))
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1)
    run, _ = trainer(
        tmp_path, callbacks=[NanGuard(str(tmp_path)), saving], steps=100, log_every_n_steps=50,
        val_check_interval=100, enable_checkpointing=True,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError):
        run.fit(model, batches(40), batches(1, seed=1))
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2


def test_the_end_of_training_is_looked_at(build, tmp_path):
    model = build()
    spoil(model, batch_number=2, value=float("nan"))
    run, _ = trainer(
        tmp_path, callbacks=[NanGuard(str(tmp_path))], steps=3, log_every_n_steps=50,
        val_check_interval=100,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError):
        run.fit(model, batches(4), batches(1, seed=1))


def test_a_healthy_training_goes_on_and_is_not_waited_for(build, tmp_path, monkeypatch):
    """No step reads the loss on the CPU: only every log_every_n_steps-th does."""
    guard, checks = NanGuard(str(tmp_path)), []
    check = guard._check
    monkeypatch.setattr(guard, "_check", lambda *args: (checks.append(1), check(*args)))
    run, _ = trainer(
        tmp_path, callbacks=[guard], steps=8, log_every_n_steps=4, val_check_interval=100
    )
    run.fit(build(), batches(8), batches(1, seed=1))
    assert run.global_step == 8 and not list(tmp_path.glob("nonfinite*"))
    assert len(checks) == 3, "after steps 4 and 8, and at the end"


@pytest.mark.slow
def test_the_command_fails_and_says_where_the_batch_is(tmp_path):
    """With a learning rate that no network survives."""
    write_text(tmp_path)
    done = subprocess.run(
        [sys.executable, PROJECT / "main.py", *overrides(tmp_path, *ALGOS["ar"]),
         "optim.lr=1e30", "trainer.gradient_clip_val=null", f"hydra.run.dir={tmp_path}/run"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "The loss became NaN or infinite at batch" in done.stdout
    assert "Traceback" not in done.stderr
    kept = torch.load(tmp_path / "run/nonfinite_rank0.pt", weights_only=True)
    assert kept["input_ids"].shape == (4, 32)
