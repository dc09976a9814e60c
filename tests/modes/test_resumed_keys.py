"""A run that goes on heeds the optimizer's keys where they are typed, and says what it does not."""

import logging

import pytest
import torch

from checkpointing.weights import read_weights
from configuration.paths import with_absolute_paths
from modes import train as train_module
from modes.resumed_keys import resumed_config
from modes.train import train
from tests.helpers.small_run import overrides, write_text
from training.typed_keys import typed_keys


@pytest.fixture
def run(compose, tmp_path, monkeypatch):
    """Trains with these overrides, as if they alone had been typed."""
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)

    def start(*changes: str) -> dict:
        keys = frozenset(change.partition("=")[0] for change in changes)
        monkeypatch.setattr(train_module, "typed_keys", lambda: keys)
        small = ["algo=mdlm", "model.n_blocks=1", "optim.lr=1e-3"]
        config = compose(overrides(tmp_path, *small, *changes))
        train(with_absolute_paths(config, launch_dir=str(tmp_path)))
        return torch.load("checkpoints/last.ckpt", weights_only=True)

    return start


def settings(checkpoint: dict) -> tuple:
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    return group["lr"], *group["betas"], group["eps"], group["weight_decay"]



def test_typed_settings_of_the_optimizer_are_heeded(run, tmp_path, caplog):
    """`optim.lr=0.5` was neither heeded nor warned of, and the manifest said 0.5."""
    first = run("trainer.max_steps=2", "training.ema=0.5")
    assert settings(first)[0] == 1e-3
    typed = ["optim.lr=0.5", "optim.beta1=0.8", "optim.beta2=0.9", "optim.eps=1e-6",
             "optim.weight_decay=0.25", "training.ema=0.75"]  # fmt: skip
    with caplog.at_level(logging.INFO):
        second = run("trainer.max_steps=3", *typed)
    assert "optim.lr=0.5 from here on; it was 0.001" in caplog.text
    assert settings(second) == (0.5, 0.8, 0.9, 1e-6, 0.25) and second["ema"]["decay"] == 0.75
    assert second["lr_schedulers"][0]["base_lrs"] == [0.5]
    assert second["hyper_parameters"]["config"]["optim"]["lr"] == 0.5
    caplog.clear()
    third = run("trainer.max_steps=4")  # not typed this time: it stays
    assert settings(third) == settings(second) and third["ema"]["decay"] == 0.75
    assert "optim.lr stays 0.5 as in the checkpoint; type optim.lr=0.001" in caplog.text
    assert third["hyper_parameters"]["config"]["optim"]["lr"] == 0.5


def test_the_first_step_is_on_the_new_curve(run):
    """A schedule takes effect at once, from the step where the run is."""
    run("trainer.max_steps=2")
    last = run("trainer.max_steps=3", "lr_scheduler.num_warmup_steps=10", "optim.lr=1e-2")
    assert settings(last)[0] == pytest.approx(3e-3)
    assert last["lr_schedulers"][0]["_last_lr"] == [pytest.approx(3e-3)]


def test_what_is_not_heeded_is_warned_of(compose, tmp_path, caplog):
    config = compose(overrides(tmp_path, "algo=bd3lm", "block_size=4", "training.from_pretrained=a",
                               "training.sampling_eps_min=0.3"))  # fmt: skip
    recorded = {"training": {"from_pretrained": "b", "sampling_eps_min": 1e-3}, "optim": {}}
    resumed_config(config, recorded, typed=set())
    assert caplog.text == ""
    keys = {"training.from_pretrained", "training.sampling_eps_min"}
    assert resumed_config(config, recorded, typed=keys) == config
    assert "training.from_pretrained=a is not heeded: the weights are those" in caplog.text
    assert "training.sampling_eps_min=0.3 is not heeded: the range is that" in caplog.text
    caplog.clear()
    same = {"training": {"from_pretrained": "a", "sampling_eps_min": 0.3}}
    resumed_config(config, same, typed=keys)
    assert caplog.text == ""


@pytest.mark.parametrize("change", ["model.length=16", "data.document=file"])
def test_other_rows_are_warned_of(change, run, caplog):
    run("trainer.max_steps=2")
    run("trainer.max_steps=3")
    assert "training rows are not the" not in caplog.text
    run("trainer.max_steps=4", change)
    assert "training rows are not the" in caplog.text


def test_rows_that_are_streamed_from_now_on(run, caplog):
    """And the other way round, which was a KeyError."""
    run("trainer.max_steps=2")
    run("trainer.max_steps=3", "data.streaming=true")
    assert "data.streaming=true, and it was not so in the checkpoint" in caplog.text
    run("trainer.max_steps=4")
    assert "data.streaming=false, and it was not so in the checkpoint" in caplog.text
    assert read_weights("checkpoints/last.ckpt").run_config["trainer"]["max_steps"] == 4


def test_a_text_that_has_shrunk(run, tmp_path):
    """The place in the epoch lies behind its end."""
    run("trainer.max_steps=20")
    lines = (tmp_path / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "train.txt").write_text("".join(lines[:20]))
    assert run("trainer.max_steps=23")["global_step"] == 23


def test_typed_keys_without_hydra():
    assert typed_keys() == frozenset()
