"""Fixtures of the tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from diffusion import Diffusion
from tests.helpers.small_module import module
from tests.helpers.small_run import ALGOS


@pytest.fixture
def slow_model(
    compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Diffusion]:
    """Makes a module by whose clock nothing takes time but its steps.

    `slow_model(training=1.0, validation=100.0)`: seconds that a batch takes.
    """
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def make(*, training: float = 1.0, validation: float = 100.0) -> Diffusion:
        model = module(compose, tmp_path, *ALGOS["ar"])

        def slow_down(hook: str, seconds: float) -> None:
            original = getattr(model, hook)

            def slow(*args):
                clock[0] += seconds
                return original(*args)

            monkeypatch.setattr(model, hook, slow)

        slow_down("training_step", training)
        slow_down("validation_step", validation)
        return model

    return make
