"""How fast a training is: what its loggers get of it."""

import pytest

from tests.helpers.small_module import batches, trainer
from training.throughput import Throughput


def test_throughput_leaves_validation_out(slow_model, tmp_path):
    run, memory = trainer(
        tmp_path, callbacks=[Throughput()], steps=8, log_every_n_steps=2, val_check_interval=3,
        accumulate_grad_batches=1,
    )  # fmt: skip
    run.fit(slow_model(training=1.0, validation=100.0), batches(8), batches(1, seed=1))
    assert memory.values("trainer/steps_per_second") == pytest.approx([1.0] * 4)
    assert memory.values("trainer/tokens_per_second") == pytest.approx([4 * 16.0] * 4)
    assert memory.values("trainer/validation_seconds") == pytest.approx([100.0] * 2)


def test_throughput_counts_optimizer_steps(slow_model, tmp_path):
    """With accumulation a step has more tokens; the last two batches were logged as one step."""
    run, memory = trainer(
        tmp_path, callbacks=[Throughput()], steps=4, log_every_n_steps=2, val_check_interval=100,
        accumulate_grad_batches=2,
    )  # fmt: skip
    run.fit(slow_model(training=1.0), batches(8), batches(1, seed=1))
    assert memory.values("trainer/steps_per_second") == pytest.approx([0.5] * 2)
    assert memory.values("trainer/tokens_per_second") == pytest.approx([4 * 16.0] * 2)


def test_a_sanity_check_is_no_validation(slow_model, tmp_path):
    """It comes before the training whose throughput is measured."""
    run, memory = trainer(
        tmp_path, callbacks=[Throughput()], steps=2, num_sanity_val_steps=1, val_check_interval=2
    )
    run.fit(slow_model(training=1.0, validation=100.0), batches(2), batches(1, seed=1))
    assert memory.values("trainer/steps_per_second") == pytest.approx([1.0] * 2)
    assert memory.values("trainer/validation_seconds") == pytest.approx([100.0])
