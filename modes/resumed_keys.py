"""Keys of a training that goes on from a checkpoint: which are heeded, and saying so."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from checkpointing.description import lookup
from utils import get_logger

logger = get_logger(__name__)

# A run that goes on keeps these as they were, unless they are typed.
KEPT_UNLESS_TYPED = (
    "optim.lr",
    "optim.weight_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "training.ema",
)
# And these whatever is typed.
KEPT = {
    "training.from_pretrained": "the weights are those of the checkpoint",
    "training.sampling_eps_min": "the range is that of the checkpoint, as the search left it",
    "training.sampling_eps_max": "the range is that of the checkpoint, as the search left it",
}


def resumed_config(
    config: DictConfig, recorded: Mapping[str, Any], *, typed: Collection[str]
) -> DictConfig:
    """The configuration of a run that goes on.

    Args:
        config: as composed.
        recorded: the configuration in the checkpoint, nested; what it lacks is as composed.
        typed: keys of the command line.
    """
    found = copy.deepcopy(config)
    for key in (*KEPT_UNLESS_TYPED, *KEPT):
        before, now = lookup(recorded, key), OmegaConf.select(config, key)
        is_possible = isinstance(before, str if key == "training.from_pretrained" else float | int)
        if not is_possible or before == now:
            continue
        if key in KEPT:
            # Without a search the range is no part of the checkpoint.
            if key in typed and (config.algo.var_min or "eps" not in key):
                logger.warning("%s=%s is not heeded: %s (%s)", key, now, KEPT[key], before)
        elif key in typed:
            logger.info("%s=%s from here on; it was %s", key, now, before)
        else:
            OmegaConf.update(found, key, before)
            logger.warning(
                "%s stays %s as in the checkpoint; type %s=%s to change it", key, before, key, now
            )
    return found
