"""Whether weights suit a run, before they are loaded: sizes, vocabulary, algorithm, block size.

The messages name the keys to type. Both sides are descriptions, see
`description.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from checkpointing.description import CONFIG_KEYS
from checkpointing.weights import Weights
from utils import get_logger

logger = get_logger(__name__)

_SIZES = ("hidden_dim", "cond_dim", "n_blocks", "n_heads")


def check_sizes(
    weights: Weights,
    wanted: Mapping[str, Any],
    *,
    key: str,
    tokenizer: str,
    allow_missing: Sequence[str] = (),
) -> None:
    """Refuse weights of a network of another size or vocabulary.

    Args:
        weights: what is to be loaded.
        wanted: the description of this run.
        key: the key that names the weights, for messages.
        tokenizer: `data.tokenizer_name_or_path`.
        allow_missing: where weights may differ, sizes are not compared: the report is by name.

    Raises:
        ValueError: names the keys, their values and those of the weights.
    """
    found = weights.hub_config
    names = [name for name in _SIZES if wanted["adaln"] or name != "cond_dim"]
    if allow_missing:
        names = ["n_heads"]  # which shows in no shape
    other = [name for name in names if found[name] not in (None, wanted[name])]
    if other:
        here = ", ".join(f"{CONFIG_KEYS[name]}={wanted[name]}" for name in other)
        there = " ".join(f"{CONFIG_KEYS[name]}={found[name]}" for name in other)
        raise ValueError(f"{here}: allowed with {key}={weights.source} is {there}")
    if found["adaln"] not in (None, wanted["adaln"]) and not allow_missing:
        raise ValueError(
            f"model.adaln={wanted['adaln']} (algo={wanted['algo']}): allowed with "
            f"{key}={weights.source} is {found['adaln']}; only algo=ar has networks without"
        )
    if found["vocab_size"] not in (None, wanted["vocab_size"]) and not allow_missing:
        raise ValueError(
            f"data.tokenizer_name_or_path={tokenizer}: its {wanted['vocab_size']} ids, the mask "
            f"counted, do not fit {key}={weights.source}, which has {found['vocab_size']}; allowed "
            "is the tokenizer that it was trained with"
        )


def print_what_changes(weights: Weights, wanted: Mapping[str, Any], *, key: str) -> None:
    """Log what may be overridden on purpose, and is: algorithm, length and block size."""
    found = weights.hub_config
    for name in ("algo", "model_length", "block_size"):
        if found[name] not in (None, wanted[name]):
            logger.warning(
                "%s=%s, while %s=%s was trained with %s",
                CONFIG_KEYS[name], wanted[name], key, weights.source, found[name],
            )  # fmt: skip


def check_same_model(
    weights: Weights, wanted: Mapping[str, Any], *, key: str, any_block_size: bool
) -> None:
    """Refuse to evaluate weights as another kind of model than they were trained as.

    mdlm is bd3lm with one block of the whole length, so either may be evaluated as the other then.

    Args:
        weights: what is to be loaded.
        wanted: the description of this run.
        key: the key that names the weights, for messages.
        any_block_size: go on with another block size all the same.

    Raises:
        ValueError: names the key, its value and what is allowed.
    """
    found = weights.hub_config
    algo = found["algo"]
    if algo not in (None, wanted["algo"]) and {algo, wanted["algo"]} != {"bd3lm", "mdlm"}:
        raise ValueError(f"algo={wanted['algo']}: allowed with {key}={weights.source} is {algo}")
    if found["time_conditioning"] not in (None, wanted["time_conditioning"]):
        raise ValueError(
            f"algo.time_conditioning={wanted['time_conditioning']}: allowed with "
            f"{key}={weights.source} is {found['time_conditioning']}"
        )
    size = _trained_block_size(weights, wanted)
    if size not in (None, wanted["block_size"]) and not any_block_size:
        raise ValueError(
            f"block_size={wanted['block_size']}: allowed with this {key} is {size}, which "
            f"{weights.source} was trained with; eval.any_block_size=true goes on all the same"
        )


def _trained_block_size(weights: Weights, wanted: Mapping[str, Any]) -> int | None:
    """The block size that the weights ask for; None where any will do."""
    if wanted["algo"] == "bd3lm" and weights.hub_config["algo"] == "mdlm":
        length = weights.hub_config["model_length"]
        return None if wanted["block_size"] == wanted["model_length"] else length
    if wanted["algo"] == "bd3lm":
        return weights.block_size
    if wanted["algo"] == "mdlm" and weights.block_size != weights.hub_config["model_length"]:
        return weights.block_size
    return None
