"""Which weights a mode starts from, and how far they may differ from what the run is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from configuration.training_request import plain


@dataclass(frozen=True, kw_only=True)
class WeightsRequest:
    """A file of weights and what it is wanted for.

    Attributes:
        source: a path or a Hub id.
        key: that names it, for messages.
        use_ema: take the moving average where there is one.
        any_block_size: whether they may be of another block size; None: of another algorithm too.
        allow_missing: names of weights that may differ.
        tokenizer: `data.tokenizer_name_or_path`.
        run_config: the whole configuration, which says what the run is.
    """

    source: str
    key: Literal["eval.checkpoint_path", "training.from_pretrained"]
    use_ema: bool
    any_block_size: bool | None
    allow_missing: tuple[str, ...]
    tokenizer: str
    run_config: Mapping[str, Any]


def weights_to_evaluate(config: DictConfig) -> WeightsRequest:
    """`eval.checkpoint_path`, averaged unless `eval.disable_ema`."""
    return WeightsRequest(
        source=config.eval.checkpoint_path,
        key="eval.checkpoint_path",
        use_ema=not config.eval.disable_ema,
        any_block_size=config.eval.any_block_size,
        **_shared(config),
    )


def weights_to_train(config: DictConfig) -> WeightsRequest | None:
    """`training.from_pretrained`, of any algorithm and block size; None: random ones."""
    if config.training.from_pretrained is None:
        return None
    return WeightsRequest(
        source=config.training.from_pretrained,
        key="training.from_pretrained",
        use_ema=False,
        any_block_size=None,
        **_shared(config),
    )


def _shared(config: DictConfig) -> dict[str, Any]:
    return {
        "allow_missing": tuple(config.eval.allow_missing),
        "tokenizer": config.data.tokenizer_name_or_path,
        "run_config": plain(config),
    }
