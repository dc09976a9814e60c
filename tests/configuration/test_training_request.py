"""What a training asks for: precision."""

import pytest

from configuration.training_request import lightning_precision, trainer_request
from tests.helpers.small_run import overrides
from training.trainer import build_trainer


@pytest.mark.parametrize(
    ("given", "expected"),
    [("bf16", "bf16-mixed"), (32, "32-true"), ("16", "16-mixed"), ("64-true", "64-true")],
)
def test_precision_of_the_original(given, expected):
    """`bf16` in the original's configs is mixed precision: the weights stay float32."""
    assert lightning_precision(given) == expected


def test_trainer_of_the_default_precision(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [o for o in overrides(tmp_path) if not o.startswith("trainer.precision")]
    trainer = build_trainer(trainer_request(compose(settings)))
    assert trainer.precision == "bf16-mixed"
