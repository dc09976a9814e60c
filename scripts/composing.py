"""The configuration of `main.py` for commands of their own."""

from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from configuration.resolvers import register_resolvers

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The composed configuration with these overrides, `key=value`.

    Raises:
        hydra.errors.HydraException: there is no such key, or it is spelled wrong.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra.compose("config", list(overrides))
