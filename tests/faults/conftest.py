"""What the table of faults is made of."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.killable_runs import Run


@pytest.fixture
def count(record_property) -> Callable[..., None]:
    """Enters a row of the table: `count("what goes wrong", tried=3, survived=3)`."""

    def enter(fault: str, *, tried: int = 1, survived: int = 1) -> None:
        record_property("fault", (fault, tried, survived))

    return enter


@pytest.fixture
def repeats() -> Callable[..., int]:
    """How often a fault happens: `repeats(20, in_suite=2)`, 20 times being for the table."""
    return lambda times, *, in_suite: times if "ALL_FAULTS" in os.environ else in_suite


@pytest.fixture
def straight(tmp_path_factory) -> Callable[..., dict]:
    """The final checkpoint of a run that nothing happens to: `straight(*changes)`."""

    def run(*changes: str) -> dict:
        undisturbed = Run(Path(tmp_path_factory.mktemp("straight")), *changes)
        undisturbed.run()
        return undisturbed.last()

    return run
