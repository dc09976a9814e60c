"""What commands share: the configuration of `main.py`, and the errors that users can mend."""

from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from configuration.resolvers import register_resolvers

# Files, values, a package or a model that is missing, memory; as in `main.py`.
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException, torch.OutOfMemoryError)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def compose(overrides: Sequence[str]) -> DictConfig:
    """The composed configuration with these overrides, `key=value`.

    Raises:
        hydra.errors.HydraException: there is no such key, or it is spelled wrong.
    """
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        return hydra.compose("config", list(overrides))
