"""What a file says of its model: sizes and algorithm, under the names of a Hub `config.json`.

Every description is a dictionary with the keys of `KEYS`, None where the file does not say.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from checkpointing.safe_pickle import Placeholder

# Where a run's configuration has what a Hub directory calls by another name.
CONFIG_KEYS = {
    "algo": "algo.name",
    "parameterization": "algo.parameterization",
    "cross_attn": "algo.cross_attn",
    "time_conditioning": "algo.time_conditioning",
    "var_min": "algo.var_min",
    "block_size": "block_size",
    "model_length": "model.length",
    "hidden_dim": "model.hidden_size",
    "cond_dim": "model.cond_dim",
    "n_blocks": "model.n_blocks",
    "n_heads": "model.n_heads",
    "dropout": "model.dropout",
    "adaln": "model.adaln",
    "attn_backend": "model.attn_backend",
    "sampling_eps_min": "training.sampling_eps_min",
    "sampling_eps_max": "training.sampling_eps_max",
}
KEYS = ("model_type", "vocab_size", "causal", *CONFIG_KEYS)
MODEL_TYPES = ("bd3lm", "mdlm")
# algo.name -> algo.parameterization
PARAMETERIZATIONS = {
    "ar": "ar",
    "bd3lm": "subs",
    "mdlm": "subs",
    "sedd": "sedd",
}
_INTEGERS = (
    "vocab_size", "block_size", "model_length", "hidden_dim", "cond_dim", "n_blocks", "n_heads",
)  # fmt: skip
_FLAGS = ("causal", "cross_attn", "time_conditioning", "var_min", "adaln")
_EMBEDDING = "backbone.vocab_embed.embedding"
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
# Configurations are shallow and short; what is not is no configuration.
_MAX_DEPTH, _MAX_NODES = 16, 100_000


def from_run_config(config: Mapping[str, Any], *, vocab_size: int | None) -> dict[str, Any]:
    """The description of a run: its composed configuration as a dictionary.

    Args:
        config: nested; interpolations of one other key are followed, and what else has no value
            or a strange one counts as not said.
        vocab_size: V, which the configuration does not hold.
    """
    found = {name: lookup(config, key) for name, key in CONFIG_KEYS.items()}
    found["vocab_size"], found["model_type"] = vocab_size, "bd3lm"
    if found["algo"] not in (None, *PARAMETERIZATIONS):
        found["algo"] = None
    if found["algo"] is not None:
        found["causal"] = found["algo"] == "ar"
        found["adaln"] = found["algo"] != "ar" or bool(found["adaln"])
    return {key: found.get(key) if _is_possible(key, found.get(key)) else None for key in KEYS}


def from_hub_config(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The description in a `config.json`.

    Raises:
        ValueError: the model type is unknown, or a size is not one.
    """
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{source}: model_type={config.get('model_type')!r}, allowed are "
            f"{' and '.join(MODEL_TYPES)}"
        )
    found = {key: config.get(key) for key in KEYS}
    for key, value in found.items():
        if not _is_possible(key, value):
            allowed = "a positive integer" if key in _INTEGERS else "true or false"
            raise ValueError(f"{source}: {key}={value!r}, allowed is {allowed}")
    if found["algo"] not in (None, *PARAMETERIZATIONS):
        known = ", ".join(PARAMETERIZATIONS)
        raise ValueError(f"{source}: algo={found['algo']!r}, allowed are {known}")
    if found["model_type"] == "mdlm":  # that class has no switches
        found |= {key: False for key in ("causal", "cross_attn") if found[key] is None}
        found["adaln"] = True if found["adaln"] is None else found["adaln"]
    if found["algo"] is None:
        found["algo"] = _algo_of_switches(found)
    return completed(found) | {"block_size": found["block_size"]}


def _algo_of_switches(found: Mapping[str, Any]) -> str | None:
    """The algorithm where it follows: networks of sedd and of timed mdlm look the same."""
    if found["parameterization"] in ("ar", "sedd"):
        return found["parameterization"]
    if found["causal"]:
        return "ar"
    if found["cross_attn"]:
        return "bd3lm"
    is_untimed = found["time_conditioning"] is False
    return "mdlm" if is_untimed or found["parameterization"] == "subs" else None


def completed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The description with the switches that follow from its algorithm."""
    algo = found["algo"]
    if algo not in PARAMETERIZATIONS:
        return dict(found)
    follows = {
        "model_type": "bd3lm",
        "parameterization": PARAMETERIZATIONS[algo],
        "causal": algo == "ar",
        "cross_attn": algo == "bd3lm",
        "time_conditioning": algo == "sedd",
        "var_min": found["sampling_eps_min"] is not None and algo == "bd3lm",
    }
    if algo != "bd3lm":
        follows["block_size"] = found["model_length"]
    return dict(found) | {key: value for key, value in follows.items() if found[key] is None}


def to_run_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that the description knows, nested."""
    config: dict[str, Any] = {}
    for name, key in CONFIG_KEYS.items():
        if found[name] is not None:
            group, _, leaf = key.rpartition(".")
            (config.setdefault(group, {}) if group else config)[leaf] = found[name]
    return config


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes that show in names and shapes of a `backbone....`."""
    found = dict.fromkeys(KEYS)
    embedding = tensors.get(_EMBEDDING)
    if embedding is None or embedding.ndim != 2:
        return found
    found["vocab_size"], found["hidden_dim"] = embedding.shape
    found["n_blocks"] = len({m[1] for name in tensors if (m := _BLOCK.match(name))})
    conditioning = tensors.get("backbone.sigma_map.mlp.0.weight")
    found["adaln"] = conditioning is not None
    if conditioning is not None:
        found["cond_dim"] = conditioning.shape[0]
    frequencies = tensors.get("backbone.rotary_emb.inv_freq")
    if frequencies is not None and frequencies.numel():
        found["n_heads"] = found["hidden_dim"] // (2 * frequencies.numel())
    for end in ("min", "max"):
        value = tensors.get(f"sampling_eps_{end}")
        if value is not None and value.numel() == 1:
            found[f"sampling_eps_{end}"] = value.item()
    return found


def merged(
    said: Mapping[str, Any] | None, shown: Mapping[str, Any], *, source: str
) -> dict[str, Any]:
    """What a file says of its model, completed by what its tensors show.

    Raises:
        ValueError: where the two contradict each other.
    """
    if said is None:
        return dict(shown)
    for key in ("vocab_size", "hidden_dim", "n_blocks", "n_heads", "cond_dim"):
        if None not in (said[key], shown[key]) and said[key] != shown[key]:
            raise ValueError(
                f"{source}: its configuration says {key}={said[key]}, its tensors have {shown[key]}"
            )
    # The range that training ended with is in the tensors; a configuration has the first one.
    return {key: shown[key] if shown[key] is not None else said[key] for key in KEYS}


def plain_config(value: Any) -> dict[str, Any]:
    """A configuration without classes: nested dictionaries, lists and scalars; empty if it is none.

    OmegaConf's containers, which the original pickles, are taken apart; interpolations stay
    strings, and anything else becomes None.
    """
    config = _plain(value, depth=0, budget=[_MAX_NODES])
    return config if isinstance(config, dict) else {}


def _plain(value: Any, *, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth > _MAX_DEPTH or budget[0] < 0:
        return None
    if isinstance(value, Placeholder):
        state = value.state if isinstance(value.state, dict) else {}
        value = state.get("_content", state.get("_val"))
        return _plain(value, depth=depth + 1, budget=budget)
    if isinstance(value, Mapping):
        return {
            key: _plain(item, depth=depth + 1, budget=budget)
            for key, item in value.items()
            if isinstance(key, str)
        }
    if isinstance(value, list | tuple):
        return [_plain(item, depth=depth + 1, budget=budget) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def lookup(config: Mapping[str, Any], key: str, *, followed: int = 0) -> Any:
    """The value at a dotted key; None where there is none. References to one other are followed."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    reference = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
    if reference is None or followed == _MAX_DEPTH:
        return node
    return lookup(config, reference[1], followed=followed + 1)


def _is_possible(key: str, value: Any) -> bool:
    """Whether a value has the type of its key; None always does."""
    if value is None or key not in (*_INTEGERS, *_FLAGS):
        return not isinstance(value, str) or "${" not in value
    return type(value) is bool if key in _FLAGS else type(value) is int and value > 0
