"""A loss far above that of noise: one warning, which names the row; none in ordinary runs."""

import logging

import pytest
import torch

from tests.helpers.small_module import batches, module, trainer
from tests.helpers.small_run import ALGOS
from training.high_loss import HighLoss

MASK = 4  # text8's


def warnings(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.name == "training.high_loss"]


def with_mask(rows, *, batch: int, row: int):
    """The batches, where one row begins with "see" and holds the mask, as a document did."""
    rows.dataset[batch]["input_ids"][row, :3] = torch.tensor([26, 12, 12])
    rows.dataset[batch]["input_ids"][row, 5:9] = MASK
    return rows


@pytest.mark.parametrize("algo", ["ar", "bd3lm", "mdlm"])
def test_a_mask_in_the_validation_text(algo, compose, tmp_path, caplog):
    """Its nll was 54 instead of 6, or infinite, and nothing said why."""
    run, _ = trainer(tmp_path, steps=4)
    valid = with_mask(batches(3, seed=1), batch=1, row=2)
    run.fit(module(compose, tmp_path, *ALGOS[algo]), batches(4), valid)
    (message,) = warnings(caplog)
    assert message.startswith("The loss of batch 1 of the validation in process 0 is ")
    assert "Its worst row, number 2, has " in message and "begins with 'see" in message


def test_a_mask_in_the_training_text(compose, tmp_path, caplog):
    """Read at the next logged step; the row is that of the first such batch."""
    run, _ = trainer(tmp_path, steps=8, log_every_n_steps=4, limit_val_batches=0)
    train = with_mask(with_mask(batches(8), batch=1, row=3), batch=2, row=0)
    run.fit(module(compose, tmp_path, *ALGOS["ar"]), train, batches(1))
    (message,) = warnings(caplog)
    assert "batch 1 of the training in process 0" in message and "number 3" in message


@pytest.mark.parametrize("algo", list(ALGOS))
def test_ordinary_runs_have_none(algo, compose, tmp_path, caplog):
    run, _ = trainer(tmp_path, steps=8)
    run.fit(module(compose, tmp_path, *ALGOS[algo]), batches(8), batches(4, seed=1))
    run.validate(run.lightning_module, batches(4, seed=1), verbose=False)
    assert not warnings(caplog)


class OneProcess:
    """What the callback asks of a trainer."""

    def __init__(self):
        self.strategy = self

    def all_gather(self, tensor):
        return tensor


def seen(losses, *, low=1e-3):
    """The callback after a batch of (B, N) losses."""
    callback = HighLoss(vocab_size=100, decode=str)  # log V is 4.6
    shared = {"mask": torch.ones_like(losses), "x_0": torch.ones_like(losses).long(), "low": low}
    callback.see(losses, batch_idx=7, is_training=False, **shared)
    callback.on_validation_epoch_end(OneProcess(), None)
    return callback


def test_where_the_limit_is(caplog):
    """A large batch has none of the slack that one token's weight needs in a small one."""
    caplog.set_level(logging.WARNING)
    seen(torch.full((64, 1024), 13.8))
    one_token = torch.zeros(1, 64)
    one_token[0, 3] = 4.6 * 1000  # at t = 1e-3
    seen(one_token)
    assert not warnings(caplog)
    seen(torch.full((64, 1024), 13.9))
    seen(torch.full((1, 64), 13.9), low=1.0)
    seen(torch.full((1, 64), torch.nan))
    assert len(warnings(caplog)) == 3


def test_one_warning_per_run(caplog):
    callback = seen(torch.full((64, 1024), 99.0))
    callback.see(torch.full((2, 4), 9e9), mask=torch.ones(2, 4), x_0=torch.ones(2, 4).long(),
                 low=1.0, batch_idx=0, is_training=True)  # fmt: skip
    callback.on_train_end(OneProcess(), None)
    assert len(warnings(caplog)) == 1
