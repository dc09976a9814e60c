"""Fixtures that every test file may use."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig

from configuration import resolvers
from corpora.tokenization import load_tokenizer
from tests.helpers.places import PROJECT, SHARED
from tests.helpers.small_run import overrides, write_text


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test's packages leave in the environment (wandb: its service) is gone behind it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the project; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared: the reference data is not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """Composes the real configuration: `compose(["algo=ar", "block_size=4"])`."""
    resolvers.register_resolvers()

    def compose_overrides(overrides: list[str] | None = None) -> DictConfig:
        with initialize_config_dir(str(PROJECT / "configs"), version_base=None):
            return hydra_compose("config", overrides or [])

    return compose_overrides


@pytest.fixture
def run_main(
    compose: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs main on a page of text: `run_main("first", "algo=ar", ...)` returns its directory."""
    import main  # most tests need nothing of it

    write_text(tmp_path)

    def run(name: str, *changes: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        config = compose(overrides(tmp_path, *changes))
        before = copy.deepcopy(config)
        main.run(config, launch_dir=str(tmp_path))
        assert config == before, "nobody changes a configuration it was given"
        return folder

    return run


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this machine appear to have a number of GPUs: `fake_gpus(8)`, `fake_gpus(0)`."""

    def set_count(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return set_count


@pytest.fixture
def data_config(compose: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., DictConfig]:
    """Composes a configuration with small rows, no workers, and a cache of its own."""

    def build(*overrides: str) -> DictConfig:
        small = [
            f"data.cache_dir={tmp_path}/cache",
            "model.length=16",
            "loader.batch_size=2",
            "loader.eval_batch_size=2",
            "loader.num_workers=0",
            "trainer.accelerator=cpu",
        ]
        return compose([*small, *overrides])

    return build


@pytest.fixture
def local_config(
    data_config: Callable[..., DictConfig], tmp_path: Path
) -> Callable[..., DictConfig]:
    """As `data_config`, for data=local with the `bytes` tokenizer and two text files.

    Their text is such that no two rows are equal.
    """
    for name, count in (("train", 50), ("valid", 10)):
        lines = (hashlib.sha256(f"{name} {i}".encode()).hexdigest() + "\n" for i in range(count))
        (tmp_path / f"{name}.txt").write_text("".join(lines))

    def build(*overrides: str) -> DictConfig:
        return data_config(
            "data=local",
            f"data.train_path={tmp_path}/train.txt",
            f"data.valid_path={tmp_path}/valid.txt",
            "data.tokenizer_name_or_path=bytes",
            "data.document=line",
            *overrides,
        )

    return build


@pytest.fixture(scope="session")
def gpt2(shared: Path):
    return load_tokenizer(str(shared / "data/tokenizers/gpt2"))


@pytest.fixture(scope="session")
def bert(shared: Path):
    return load_tokenizer(str(shared / "data/tokenizers/bert-base-uncased"))
