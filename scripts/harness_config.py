"""The configuration of a model for the harness: what its checkpoint and its user say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from checkpointing.description import CONFIG_KEYS, completed, lookup
from checkpointing.weights import Weights, read_weights
from configuration import validate
from corpora.tokenization import bpe_size
from likelihood.estimators import SETTINGS
from noise_schedule import SCHEDULES
from scripts.composing import compose

SOURCE, TOKENIZER = "eval.checkpoint_path", "data.tokenizer_name_or_path"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt")
# What `--model_args` and the command may say instead of a key. `pretrained` is lm-eval's own word,
# by which it also names the results.
SHORT = {"checkpoint": SOURCE, "pretrained": SOURCE, **{name: f"eval.{name}" for name in SETTINGS}}
# Other than for `main.py`: float32, since choices are compared by sums, and no text is drawn again.
DEFAULTS = {
    "mode": "ppl_eval",
    "trainer.precision": "32",
    "sampling.min_entropy": "null",
    "wandb": "null",
}


def harness_config(keys: Mapping[str, Any]) -> tuple[DictConfig, Weights]:
    """The validated configuration of a checkpoint's model, and its weights.

    Args:
        keys: `SHORT` and any key of the configuration. They win over what the checkpoint says,
            which is needed where it says nothing (a bare `.safetensors` file).

    Raises:
        ValueError, OSError, hydra.errors.HydraException: a key or a value that there is not, or no
            such checkpoint.
    """
    changes = {SHORT.get(key, key): typed(value) for key, value in keys.items()}
    source = changes.pop(SOURCE, None)
    if source is None:
        raise ValueError(
            "checkpoint=...: allowed is what eval.checkpoint_path takes, a checkpoint, a "
            "Hub-format directory, a .safetensors file or a Hub id"
        )
    weights = read_weights(source)
    config = described_config(weights, changes)
    validate(config)
    return config, weights


def described_config(weights: Weights, changes: Mapping[str, str]) -> DictConfig:
    """The composed configuration; keys and values of `changes` are as typed for `main.py`."""
    algo = completed(weights.hub_config)["algo"]
    groups = {"algo": algo, "noise": weights.noise if weights.noise in SCHEDULES else None}
    groups = {name: value for name, value in groups.items() if value is not None}
    overrides = {**defaults(changes.get("algo", algo)), **groups, **changes}
    config = compose([f"{key}={value}" for key, value in overrides.items()])
    said = described_keys(weights)
    if "algo" in changes:  # another algorithm brings its own switches
        said = {k: v for k, v in said.items() if not k.startswith("algo.") and k != "block_size"}
    for key, value in said.items():
        if key not in changes:
            OmegaConf.update(config, key, value)
    return config


def described_keys(weights: Weights) -> dict[str, str | int | float | bool]:
    """What a checkpoint says of its model as keys of the configuration."""
    found = completed(weights.hub_config)
    # The first two follow from `algo`; the backend is the best one here, whatever the training had.
    left_out = {"algo", "parameterization", "attn_backend"}
    if found["algo"] != "bd3lm":
        left_out.add("block_size")  # which follows from model.length
    said = {key: found[name] for name, key in CONFIG_KEYS.items() if name not in left_out}
    said |= {TOKENIZER: described_tokenizer(weights), SOURCE: weights.source}
    return {key: value for key, value in said.items() if is_plain(value)}


def described_tokenizer(weights: Weights) -> str | None:
    """What `data.tokenizer_name_or_path` was in the training; None where nothing says it."""
    recorded = (weights.tokenizer or {}).get("name")
    if recorded is not None and bpe_size(recorded) is not None:  # kept as a whole in the record
        return recorded
    of_run = lookup(weights.run_config, TOKENIZER)
    if of_run is None and any((Path(weights.source) / name).is_file() for name in TOKENIZER_FILES):
        return weights.source
    return of_run or recorded


def is_plain(value: object) -> bool:
    """Whether a value is one, and no reference: what a file says may not read the environment."""
    return value is not None and "${" not in str(value)


def defaults(algo: str | None) -> dict[str, str]:
    """What is measured, and how texts are drawn, where neither user nor checkpoint says it."""
    if algo == "sedd":
        return DEFAULTS | {
            "eval.likelihood": "nelbo", "eval.num_draws": "32", "algo.T": "${model.length}"
        }  # fmt: skip
    keeps_keys = algo != "mdlm"
    return DEFAULTS | {"eval.likelihood": "left_to_right", "sampling.kv_cache": str(keeps_keys)}


def typed(value: Any) -> str:
    """A value as it is typed for `main.py`, where lm-eval has read it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(typed, value))}]"
    return "null" if value is None else str(value)
