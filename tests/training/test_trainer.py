"""Flags of Lightning's trainer, in the real configuration: as in Lightning, or a line says why not.

What people add first ended in tracebacks, or were ignored.
"""

import csv

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from training.throughput import Throughput

SMALL = ("algo=mdlm", "model.n_blocks=1", "trainer.limit_val_batches=1")


@pytest.fixture(autouse=True)
def what_is_said(caplog):
    caplog.set_level("INFO")


@pytest.fixture
def train(run_main):
    """Trains two steps with flags; the run's directory."""
    return lambda *flags: run_main("run", *SMALL, "trainer.max_steps=2", *flags)


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # a lock


def checkpoints(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("*")}


EVERYTHING = {"checkpoints", "manifest.json", "metrics", "training_curve.png"}


@pytest.mark.parametrize("number", ["true", 2])
def test_fast_dev_run(number, train, caplog):
    """A batch or two of each kind, and nothing is kept; the curve of no numbers was a TypeError."""
    folder = train(f"+trainer.fast_dev_run={number}", "trainer.max_steps=500")
    assert files(folder) == set()
    count = 2 if number == 2 else 1
    assert f"step {count} of {count}" in caplog.text and f"{count} batches in" in caplog.text


def test_fast_dev_run_resumes_nothing(run_main, tmp_path, caplog):
    """Of a training at its end there would be no batch left to try."""
    run_main("first", *SMALL, "trainer.max_steps=1", "checkpointing.save_dir=kept")
    caplog.clear()
    run_main("again", *SMALL, "checkpointing.save_dir=kept", "+trainer.fast_dev_run=true")
    assert "Going on" not in caplog.text and "step 1 of 1" in caplog.text
    assert "manifest.json" in files(tmp_path / "kept")


@pytest.mark.parametrize("repeated", ["2", "0.03"])
def test_overfit_batches(repeated, run_main, monkeypatch):
    """Every epoch has the same rows; Lightning's own sampler knew no position to resume from."""
    seen = []

    def record(self, trainer, pl_module, outputs, batch, batch_idx):
        seen.append(batch["input_ids"])

    monkeypatch.setattr(Throughput, "on_train_batch_end", record)
    flags = (f"+trainer.overfit_batches={repeated}", "loader.eval_batch_size=1",
             "checkpointing.save_dir=kept")  # fmt: skip
    run_main("first", *SMALL, *flags, "trainer.max_steps=3")
    run_main("second", *SMALL, *flags, "trainer.max_steps=5")
    rows = [tuple(batch.flatten().tolist()) for batch in seen]
    assert len(rows) == 5 and rows[:2] == rows[2:4] and rows[4] == rows[0]
    assert rows[0] != rows[1]


def test_too_small_a_fraction_to_overfit(train):
    with pytest.raises(MisconfigurationException, match="0.01"):
        train("+trainer.overfit_batches=0.01")


def test_no_progress_bar(train, caplog):
    folder = train("+trainer.enable_progress_bar=false")
    assert files(folder) == EVERYTHING and "step 1 of 2" not in caplog.text


def test_no_checkpoints(train):
    folder = train("+trainer.enable_checkpointing=false")
    assert files(folder) == EVERYTHING - {"checkpoints"}


def test_no_logger(train):
    folder = train("+trainer.logger=false")
    assert files(folder) == EVERYTHING - {"metrics", "training_curve.png"}
    assert "last.ckpt" in checkpoints(folder)


def test_barebones(train):
    assert files(train("+trainer.barebones=true")) == set()


def test_profiler(train, caplog):
    """Its report was silenced with Lightning's other lines."""
    train("+trainer.profiler=simple")
    assert "run_training_batch" in caplog.text


@pytest.mark.slow
def test_model_summary(train, caplog, capsys):
    train("+trainer.enable_model_summary=true", "+trainer.max_epochs=1")
    assert "Trainable params" in caplog.text + capsys.readouterr().out


@pytest.mark.slow
def test_all_devices_of_a_machine_without_gpu(train):
    """trainer.devices=-1, which the rules allow, was refused by Lightning."""
    assert "last.ckpt" in checkpoints(train("trainer.devices=-1"))


@pytest.mark.slow
def test_limits(train):
    """Two batches an epoch: the second epoch's checkpoint says so."""
    folder = train("trainer.limit_train_batches=1", "trainer.val_check_interval=1")
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    (metrics,) = folder.glob("metrics/*/metrics.csv")
    with metrics.open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} >= {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "+trainer.detect_anomaly=true",
        "+trainer.deterministic=true",
        "+trainer.max_epochs=1 trainer.limit_train_batches=2 trainer.max_steps=-1",
        "+trainer.max_time=00:00:10:00",
        "+trainer.min_steps=1",
        "+trainer.min_epochs=1",
        "trainer.num_sanity_val_steps=2",
        "trainer.limit_val_batches=0",
        "trainer.val_check_interval=0.01",
        "trainer.check_val_every_n_epoch=2 trainer.val_check_interval=1.0",
        "trainer.log_every_n_steps=50",
        "+trainer.gradient_clip_algorithm=value",
        "trainer.gradient_clip_val=null",
        "+trainer.inference_mode=false",
        "+trainer.reload_dataloaders_every_n_epochs=1",
        "+trainer.use_distributed_sampler=false",
        "trainer.devices=auto",
        "+trainer.sync_batchnorm=true",
        "+trainer.benchmark=true",
        "+trainer.default_root_dir=elsewhere",
        "+trainer.logger=true",
        "optim.beta1=0",
    ],
)
def test_what_always_worked(flags, train):
    assert "last.ckpt" in checkpoints(train(*flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("+trainer.foo=1", "trainer .*unexpected keyword argument 'foo'"),
        ("+trainer.gradient_clip_algorithm=foo", "trainer .*Allowed algorithms"),
        ("+trainer.max_time=soon", "trainer .*not a valid duration"),
        ("+callbacks.mine._target_=no.such", "callbacks.mine .no.such.: .*no.such"),
        ("lr_scheduler._target_=no.such", "lr_scheduler .no.such.: .*no.such"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches=0: allowed"),
        ("trainer.precision=64", "trainer.precision=64: allowed are 32-true"),
        ("+trainer.fast_dev_run=soon", "trainer.fast_dev_run=soon: allowed"),
        ("+trainer.fast_dev_run=-1", "trainer.fast_dev_run=-1: allowed"),
        ("+trainer.overfit_batches=1.5", "trainer.overfit_batches=1.5: allowed"),
        ("+trainer.overfit_batches=some", "trainer.overfit_batches=some: allowed"),
        ("+trainer.overfit_batches=1 data.streaming=true", "allowed with data.streaming=true is 0"),
        ("+trainer.callbacks=[]", "callbacks.NAME"),
        ("+trainer.strategy=ddp", "strategy=ddp"),
        ("+trainer.plugins=[]", "trainer.plugins"),
        ("+trainer.use_distributed_sampler=true", "loads its own rows"),
        ("+trainer.enable_progress_bar=some", "allowed are true and false"),
        ("+trainer.fast_dev_run=true then=[ppl_eval]", "which needs a checkpoint, is false"),
        ("+trainer.enable_checkpointing=false then=[ppl_eval]", "needs a checkpoint, is true"),
        ("+trainer.barebones=true mode=ppl_eval", "whose numbers are logged"),
    ],
)
def test_what_does_not_work_is_said(flags, message, train):
    with pytest.raises(ValueError, match=message) as caught:
        train(*flags.split())
    assert "\n" not in str(caught.value)


def test_flags_of_an_evaluation(run_main, caplog):
    last = run_main("first", *SMALL, "trainer.max_steps=1") / "checkpoints/last.ckpt"
    rows = {"fast_dev_run=true": 4, "overfit_batches=1": 4, "enable_progress_bar=false": 8,
            "logger=false": 8}  # fmt: skip
    for number, (flag, expected) in enumerate(rows.items()):
        caplog.clear()
        changes = ("trainer.limit_val_batches=2", f"eval.checkpoint_path={last}")
        folder = run_main(f"eval{number}", *SMALL, "mode=ppl_eval", f"+trainer.{flag}", *changes)
        assert files(folder) == {"ppl_eval.json"}
        assert f'"num_rows": {expected}' in (folder / "ppl_eval.json").read_text()
        is_silent = flag == "enable_progress_bar=false"
        assert ("validation: " in caplog.text) != is_silent
