"""The moving average during a Lightning run, and the checkpoints that come out of it."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from checkpointing.checkpoint_io import AtomicCheckpointIO
from training.callbacks import EMACallback, LastCheckpoint, RegularCheckpoint


class Line(L.LightningModule):
    """One weight that grows by 1 with each optimizer step; remembers what validation saw."""

    def __init__(self, *, fail_in_validation: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []
        self.fail_in_validation = fail_in_validation

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())
        if self.fail_in_validation:
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(model, callback, *, tmp_path, steps=4, resume=None, **settings):
    callbacks = callback if isinstance(callback, list) else [callback] if callback else []
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    loader = DataLoader([0.0] * 8, batch_size=1)
    trainer.fit(model, loader, DataLoader([0.0]), ckpt_path=resume, weights_only=True)
    return trainer


def averages(steps: int, decay: float = 0.9) -> list[float]:
    """The average of 1, 2, 3, ... that starts from 0, after each step."""
    shadow, found = 0.0, []
    for n in range(1, steps + 1):
        d = min(decay, (1 + n) / (10 + n))
        shadow = d * shadow + (1 - d) * n
        found.append(shadow)
    return found


def test_validation_sees_the_average_and_training_goes_on_from_the_weights(tmp_path):
    """The average was not taken back after use: training continued from it."""
    model, callback = Line(), EMACallback(0.9)
    fit(model, callback, tmp_path=tmp_path, val_check_interval=2)
    expected = averages(4)
    assert model.seen == pytest.approx([expected[1], expected[3]])
    assert model.weight.item() == 4.0
    assert callback.ema.shadow[0].item() == pytest.approx(expected[3])


def test_an_interrupted_validation_gives_the_weights_back(tmp_path):
    model = Line(fail_in_validation=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(model, EMACallback(0.9), tmp_path=tmp_path, val_check_interval=2)
    assert model.weight.item() == 2.0


def test_accumulated_batches_are_one_update(tmp_path):
    callback = EMACallback(0.9)
    fit(Line(), callback, tmp_path=tmp_path, steps=3, accumulate_grad_batches=2)
    assert callback.ema.num_updates == 3


def test_checkpoint_returns(tmp_path):
    """Two steps, a checkpoint, two more: the average of four in a row."""
    path = tmp_path / "two.ckpt"
    fit(Line(), EMACallback(0.9), tmp_path=tmp_path, steps=2).save_checkpoint(path)
    stored = torch.load(path, weights_only=True)["ema"]
    assert list(stored) == ["decay", "num_updates", "shadow_params"]
    assert stored["num_updates"] == 2 and isinstance(stored["shadow_params"], list)

    callback = EMACallback(0.9)
    fit(Line(), callback, tmp_path=tmp_path, steps=4, resume=path)
    assert callback.ema.num_updates == 4
    assert callback.ema.shadow[0].item() == pytest.approx(averages(4)[3])


def test_a_checkpoint_without_average_starts_it_from_its_weights(tmp_path):
    """Written with training.ema=0. The average began at the random weights of the new network."""
    path = tmp_path / "plain.ckpt"
    fit(Line(), None, tmp_path=tmp_path, steps=2).save_checkpoint(path)
    callback = EMACallback(0.9)
    fit(Line(), callback, tmp_path=tmp_path, steps=3, resume=path)
    assert callback.ema.shadow[0].item() == pytest.approx(2 + (1 - 2 / 11))


class StopAfter(L.Callback):
    """Stops as trainer.max_time does, after a number of steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.parametrize("stop", ["max_steps", "max_time"])
def test_the_end_of_training_is_kept(stop, tmp_path):
    """A run that ended between two checkpoints lost what it had learnt since the last one."""
    regular = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=500)
    stopper = [StopAfter(2)] if stop == "max_time" else []
    steps = 2 if stop == "max_steps" else 100
    callbacks = [regular, LastCheckpoint(), EMACallback(0.9), *stopper]
    fit(Line(), callbacks, tmp_path=tmp_path, steps=steps)
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["ema"]["num_updates"] == 2
    assert checkpoint["state_dict"]["weight"].item() == 2.0


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Names of the checkpoints that are written, each time anew."""
    names, save = [], AtomicCheckpointIO.save_checkpoint

    def counted(self, checkpoint, path, storage_options=None):
        names.append(str(path).rsplit("/", 1)[-1])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", counted)
    return names


def regular(folder) -> RegularCheckpoint:
    """As the configuration makes it, for every second step."""
    return RegularCheckpoint(
        dirpath=folder, monitor="step", mode="max", save_top_k=2, save_last=True,
        every_n_train_steps=2, enable_version_counter=False, filename="{step}",
        auto_insert_metric_name=False, save_on_train_epoch_end=True,
    )  # fmt: skip


def fit_regular(folder, *, steps: int, resume=None, **settings) -> RegularCheckpoint:
    callback = regular(folder)
    settings = {"limit_val_batches": 0} | settings
    fit(
        Line(), [callback, LastCheckpoint()], tmp_path=folder, steps=steps, resume=resume,
        plugins=[AtomicCheckpointIO()], **settings,
    )  # fmt: skip
    return callback


def steps_in(folder) -> dict[str, int]:
    return {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in sorted(folder.glob("*"))
        if path.is_file()
    }


def test_a_checkpoint_is_written_once(tmp_path, written):
    """Two files of the same content, each of 2.5 GB at `small`'s size with its average, were."""
    fit_regular(tmp_path, steps=6)
    assert written == ["2.ckpt", "4.ckpt", "6.ckpt"]
    assert steps_in(tmp_path) == {"4.ckpt": 4, "6.ckpt": 6, "last.ckpt": 6}, "and nothing besides"
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "6.ckpt")
    (tmp_path / "6.ckpt").unlink()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_what_a_validation_found_is_written_apart(tmp_path, written):
    """It is no part of the regular checkpoint of that step, of which last.ckpt is a name before."""
    fit_regular(tmp_path, steps=2, limit_val_batches=1, val_check_interval=2)
    assert written == ["2.ckpt", "last.ckpt"]
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "2.ckpt")


def test_between_two_regular_ones_it_is_a_file_of_its_own(tmp_path, written):
    fit_regular(tmp_path, steps=3)
    assert written == ["2.ckpt", "last.ckpt"]
    assert steps_in(tmp_path) == {"2.ckpt": 2, "last.ckpt": 3}


def test_without_links_both_are_written(tmp_path, written, monkeypatch):
    """As on exFAT; and a step that is repeated there must not find its file of the first time."""

    def refuse(*_args):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    fit_regular(tmp_path, steps=2)
    assert written == ["2.ckpt", "last.ckpt"]
    assert steps_in(tmp_path) == {"2.ckpt": 2, "last.ckpt": 2}


def test_what_lightnings_class_kept_goes_on_being_kept(tmp_path):
    """Checkpoints know the callbacks' state by the name of the class."""
    assert regular(tmp_path).state_key == ModelCheckpoint(
        dirpath=tmp_path, monitor="step", mode="max", every_n_train_steps=2,
        save_on_train_epoch_end=True,
    ).state_key  # fmt: skip
    fit_regular(tmp_path, steps=4)
    resumed = fit_regular(tmp_path, steps=6, resume=tmp_path / "last.ckpt")
    assert sorted(steps_in(tmp_path)) == ["4.ckpt", "6.ckpt", "last.ckpt"], "2.ckpt went as it had"
    assert resumed.best_model_path.endswith("6.ckpt")


def test_a_run_of_the_default_configuration_has_it(compose, run_main):
    """The configuration names Lightning's class, as the original's does."""
    changes = ["algo=mdlm", "trainer.max_steps=2", "trainer.val_check_interval=4"]
    folder = run_main("first", *changes) / "checkpoints"
    (regular,) = folder.glob("*-2.ckpt")
    assert (folder / "last.ckpt").samefile(regular)
