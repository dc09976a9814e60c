"""Fixtures of the data tests."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from corpora.tokenization import load_tokenizer


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
