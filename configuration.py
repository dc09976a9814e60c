"""The rules of a valid run, and the keys that do nothing.

`validate` comes right after Hydra has composed, before anything is loaded. Every rule raises a
`ValueError` that names key, value and what is allowed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from resolvers import devices_per_node, div_up, world_size

FULL_RANGE_LOW = 1e-3  # the lower end of the unclipped range of masked fractions


# --- keys that exist and do nothing ---------------------------------------------------------

# The original accepts these without reading them. They stay so that its commands keep working.
IGNORED_KEYS: dict[str, Any] = {
    "diffusion": "absorbing_state",
    "training.coeff_clip": -1.0,
    "sampling.noise_removal": False,
    "model.scale_by_sigma": True,
    "model.tie_word_embeddings": True,
    "noise.sigma_min": 1e-4,
    "noise.sigma_max": 20,
    "algo.dropout": 0.0,
    "algo.causal_attention": False,  # True in algo=ar
    "eval.generate_samples": False,
    "eval.compute_perplexity_on_sanity": False,
}


def ignored_key_warnings(config: DictConfig) -> list[str]:
    """Returns one sentence for each key the user changed although it does nothing."""
    defaults = IGNORED_KEYS | {"algo.causal_attention": config["algo"]["name"] == "ar"}
    return [
        f"{key}={_value(config, key)} has no effect: the key is accepted for compatibility "
        f"(default {default})"
        for key, default in defaults.items()
        if _value(config, key) != default
    ]


# --- tables of allowed values ---------------------------------------------------------------

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("train", "ppl_eval", "sample_eval"),
    "algo.name": ("ar", "bd3lm", "mdlm", "sedd"),
    "algo.parameterization": ("ar", "subs", "sedd"),
    "algo.backbone": ("dit", "hf_dit"),
    "algo.sampler": ("ar", "semi_ar", "analytic"),
    "noise.type": ("loglinear", "square", "square_root", "log", "cosine"),
    "model.attn_backend": ("flash_attn", "auto", "flex", "sdpa"),
    "training.activation_checkpointing": ("none", "blocks"),
    "logger.name": ("wandb", "tensorboard", "csv"),
    "trainer.accelerator": ("auto", "cpu", "cuda", "gpu"),
}

# An integer or any real number, and its interval. A key whose default is computed from another
# one comes after it, so that the error names the key the user wrote.
_NUMBERS: dict[str, tuple[type, str]] = {
    "seed": (int, "[0, 4294967295]"),
    "model.length": (int, "[1, inf)"),
    "block_size": (int, "[1, inf)"),
    "model.hidden_size": (int, "[1, inf)"),
    "model.cond_dim": (int, "[1, inf)"),
    "model.n_blocks": (int, "[1, inf)"),
    "model.n_heads": (int, "[1, inf)"),
    "model.dropout": (float, "[0, 1)"),
    "trainer.num_nodes": (int, "[1, inf)"),
    "loader.global_batch_size": (int, "[1, inf)"),
    "loader.eval_global_batch_size": (int, "[1, inf)"),
    "loader.batch_size": (int, "[1, inf)"),
    "loader.eval_batch_size": (int, "[1, inf)"),
    "loader.num_workers": (int, "[0, inf)"),
    "sampling.num_sample_batches": (int, "[1, inf)"),
    "sampling.nucleus_p": (float, "(0, 1]"),
    "sampling.max_retries": (int, "[0, inf)"),
    "training.ema": (float, "[0, 1)"),
    "training.sampling_eps": (float, "(0, 1)"),
    "training.sampling_eps_min": (float, "(0, 1]"),
    "training.sampling_eps_max": (float, "(0, 1]"),
    "eval.perplexity_batch_size": (int, "[1, inf)"),
    "optim.lr": (float, "(0, inf)"),
    "optim.weight_decay": (float, "[0, inf)"),
    "optim.beta1": (float, "[0, 1)"),
    "optim.beta2": (float, "[0, 1)"),
    "optim.eps": (float, "(0, inf)"),
    "algo.T": (int, "[0, inf)"),
    "algo.clip_search_delta": (float, "(0, 1)"),
    "trainer.accumulate_grad_batches": (int, "[1, inf)"),
    "trainer.num_sanity_val_steps": (int, "[-1, inf)"),
    "trainer.max_steps": (int, "[-1, inf)"),
    "trainer.log_every_n_steps": (int, "[1, inf)"),
    "trainer.limit_train_batches": (float, "(0, inf)"),
    "trainer.limit_val_batches": (float, "[0, inf)"),  # 0 switches validation off
    "trainer.val_check_interval": (float, "(0, inf)"),
}

_FLAGS = (
    "sampling.var_length",
    "sampling.first_hitting",
    "sampling.kv_cache",
    "sampling.stop_on_eos",
    "eval.any_block_size",
    "sampling.compile",
    "sampling.live",
    "training.antithetic_sampling",
    "training.resample",
    "training.eval_nll",
    "eval.disable_ema",
    "algo.time_conditioning",
    "algo.ignore_bos",
    "algo.cross_attn",
    "algo.var_min",
    "algo.fix_clipping",
    "algo.mdlm_loss_scale",
    "model.adaln",
    "checkpointing.resume_from_ckpt",
)

# algo.name -> (algo.parameterization, algo.sampler)
_ALGOS = {
    "ar": ("ar", "ar"),
    "bd3lm": ("subs", "semi_ar"),
    "mdlm": ("subs", "semi_ar"),
    "sedd": ("sedd", "analytic"),
}


def _value(config: DictConfig, key: str) -> Any:
    """Returns the value at a dotted key, with its interpolation resolved."""
    node = config
    for part in key.split("."):
        node = node[part]
    return node


def _modes(config: DictConfig) -> set[str]:
    """Returns every mode of the run."""
    return {config["mode"], *config["then"]}


def _lies_in(value: float, interval: str) -> bool:
    """Tells whether a number lies in an interval such as "(0, 1]"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _is_number(value: Any, kind: type) -> bool:
    """Tells whether a value is an int, or also a float where `kind` is float; never a bool."""
    return type(value) is int or (kind is float and type(value) is float)


# --- rules: each yields the keys that are wrong and what is allowed instead ------------------

Problems = Iterator[tuple[str, str]]


def _choices(config: DictConfig) -> Problems:
    """A name is one of the known ones."""
    for key, allowed in _CHOICES.items():
        if _value(config, key) not in allowed:
            yield key, f"allowed are {', '.join(allowed)}"


def _following_modes(config: DictConfig) -> Problems:
    """The modes that follow the first one are modes too."""
    modes = _CHOICES["mode"]
    if not isinstance(config["then"], ListConfig) or not set(config["then"]) <= set(modes):
        yield "then", f"allowed is a list of {', '.join(modes)}"


def _devices(config: DictConfig) -> Problems:
    """The devices are in a form that Lightning takes, and GPUs are asked for where they exist."""
    trainer = config["trainer"]
    devices_per_node(trainer["devices"], trainer["accelerator"])
    if trainer["accelerator"] in ("cuda", "gpu") and not torch.cuda.is_available():
        yield "trainer.accelerator", "no CUDA device is visible here; allowed are cpu, auto"


def _numbers(config: DictConfig) -> Problems:
    """A number is of the right type and lies in its interval."""
    for key, (kind, interval) in _NUMBERS.items():
        value = _value(config, key)
        if key == "loader.batch_size" and value == "auto":  # see `_automatic_batch_size`
            continue
        if not _is_number(value, kind) or not _lies_in(value, interval):
            yield key, f"allowed is {'an integer' if kind is int else 'a number'} in {interval}"


def _flags(config: DictConfig) -> Problems:
    """A switch is true or false."""
    for key in _FLAGS:
        if type(_value(config, key)) is not bool:
            yield key, "allowed are true and false"


def _compile(config: DictConfig) -> Problems:
    """A switch that may also be left to the device."""
    value = config["training"]["compile"]
    if type(value) is not bool and value != "auto":
        yield "training.compile", "allowed are true, false and auto"


def _fractions(config: DictConfig) -> Problems:
    """A float number of batches is a fraction of the data set, as in Lightning."""
    for key in ("limit_train_batches", "limit_val_batches", "val_check_interval"):
        value = config["trainer"][key]
        if type(value) is float and value > 1.0:
            yield f"trainer.{key}", "allowed are an integer (batches) and a float <= 1 (a fraction)"
    if "ppl_eval" in _modes(config) and config["trainer"]["limit_val_batches"] == 0:
        yield "trainer.limit_val_batches", "allowed with mode=ppl_eval are positive numbers"


def _block_divides_length(config: DictConfig) -> Problems:
    """A sequence is a whole number of blocks."""
    length, block_size = config["model"]["length"], config["block_size"]
    if length % block_size:
        divisors = [size for size in range(1, length + 1) if length % size == 0]
        below = max(size for size in divisors if size < block_size)
        near = [str(below), *(str(size) for size in divisors if size > block_size)][:2]
        yield (
            "block_size",
            f"allowed are the divisors of model.length={length}; nearest: {', '.join(near)}",
        )


def _head_size(config: DictConfig) -> Problems:
    """The heads share the hidden size evenly; rotary embedding turns pairs of features."""
    hidden_size, n_heads = config["model"]["hidden_size"], config["model"]["n_heads"]
    if hidden_size % (2 * n_heads):
        yield (
            "model.n_heads",
            f"allowed are numbers that cut model.hidden_size={hidden_size} into heads of one "
            "even size",
        )


def _algo_combination(config: DictConfig) -> Problems:
    """Parameterization and sampler are those of the algorithm."""
    name = config["algo"]["name"]
    for key, allowed in zip(("parameterization", "sampler"), _ALGOS[name], strict=True):
        if config["algo"][key] != allowed:
            yield f"algo.{key}", f"allowed with algo.name={name} is {allowed}"


def _blocks_need_bd3lm(config: DictConfig) -> Problems:
    """Only bd3lm models block by block; mdlm may also sample long texts in windows of a block."""
    name, cross_attn = config["algo"]["name"], config["algo"]["cross_attn"]
    by_blocks = name == "bd3lm" and cross_attn
    in_windows = name == "mdlm" and _modes(config) == {"sample_eval"}
    length = config["model"]["length"]
    if config["block_size"] < length and not by_blocks and not in_windows:
        yield (
            "block_size",
            f"allowed with mode={'+'.join(sorted(_modes(config)))}, algo.name={name} and "
            f"algo.cross_attn={cross_attn} is model.length={length}; "
            "smaller blocks need algo=bd3lm",
        )


def _block_attention(config: DictConfig) -> Problems:
    """Attention between noisy and clean blocks, and what builds on it, need their algorithm."""
    algo = config["algo"]
    if algo["cross_attn"] and algo["parameterization"] != "subs":
        yield (
            "algo.cross_attn",
            f"allowed with algo.parameterization={algo['parameterization']} is False",
        )
    if algo["var_min"] and not algo["cross_attn"]:
        yield "algo.var_min", "allowed with algo.cross_attn=False is False"


def _loss_scale(config: DictConfig) -> Problems:
    """The earlier papers' loss exists for their algorithms."""
    name = config["algo"]["name"]
    if config["algo"]["mdlm_loss_scale"] and name not in ("mdlm", "sedd"):
        yield "algo.mdlm_loss_scale", f"allowed with algo.name={name} is False"


def _clipped_range(config: DictConfig) -> Problems:
    """The clipped range of masked fractions is a range."""
    high = config["training"]["sampling_eps_max"]
    if config["training"]["sampling_eps_min"] > high:
        yield "training.sampling_eps_min", f"allowed are values <= training.sampling_eps_max={high}"


def _resampling(config: DictConfig) -> Problems:
    """Drawing again ends only if a block can realise some masked fraction inside the range."""
    low, high = config["training"]["sampling_eps_min"], config["training"]["sampling_eps_max"]
    least = 0.0 if low == FULL_RANGE_LOW else low  # the full range's end does not bind
    size, slack = config["block_size"], FULL_RANGE_LOW / 2  # the slack of ClipInterval.mask_counts
    reachable = math.floor(high * size + slack) >= math.ceil(least * size - slack)
    if config["training"]["resample"] and not reachable:
        yield (
            "training.resample",
            f"allowed with block_size={size} are ranges that hold a multiple of 1/{size}, unlike "
            f"training.sampling_eps_min={low} to training.sampling_eps_max={high}",
        )


def _clip_search_widths(config: DictConfig) -> Problems:
    """A candidate width is a fraction, and with resampling wide enough to hold some count."""
    key, size = "algo.clip_search_widths", config["block_size"]
    widths = _value(config, key)
    if not isinstance(widths, ListConfig):
        yield key, "allowed is a list of numbers in (0, 1)"
    if not all(_is_number(width, float) and _lies_in(width, "(0, 1)") for width in widths):
        yield key, "allowed are numbers in (0, 1)"
    if config["training"]["resample"] and size > 1 and any(width * size < 1 for width in widths):
        yield (
            key,
            f"allowed with training.resample=True and block_size={size} are widths >= 1/{size}: "
            "a narrower range may hold no masked fraction of a block",
        )


def _flex_needs_gpu_to_train(config: DictConfig) -> Problems:
    """FlexAttention computes no gradients on the CPU."""
    accelerator = config["trainer"]["accelerator"]
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if "train" in _modes(config) and config["model"]["attn_backend"] == "flex" and on_cpu:
        yield (
            "model.attn_backend",
            f"FlexAttention has no CPU backward pass; allowed with mode=train and "
            f"trainer.accelerator={accelerator} are auto, sdpa, flash_attn",
        )


def _sampling_steps(config: DictConfig) -> Problems:
    """Samplers on a time grid need steps; first-hitting and ar count their own."""
    sampler, first_hitting = config["algo"]["sampler"], config["sampling"]["first_hitting"]
    on_grid = sampler == "analytic" or (sampler == "semi_ar" and not first_hitting)
    if "sample_eval" in _modes(config) and on_grid and config["algo"]["T"] < 1:
        yield (
            "algo.T",
            f"allowed with algo.sampler={sampler} and sampling.first_hitting={first_hitting} is "
            "an integer in [1, inf), the number of steps",
        )


def _sampling_without_time(config: DictConfig) -> Problems:
    """The semi-autoregressive samplers keep no time that they could tell the network."""
    algo = config["algo"]
    if "sample_eval" in _modes(config) and algo["sampler"] == "semi_ar":
        if algo["time_conditioning"]:
            yield "algo.time_conditioning", "allowed with algo.sampler=semi_ar is False"


def _sampling_texts(config: DictConfig) -> Problems:
    """One source of canvases at a time, and room for at least one token."""
    sampling = config["sampling"]
    if sampling["prompts"] is not None and sampling["infill"] is not None:
        yield "sampling.infill", f"allowed with sampling.prompts={sampling['prompts']} is null"
    limit = sampling["max_new_tokens"]
    if limit is not None and (type(limit) is not int or limit < 1):
        yield "sampling.max_new_tokens", "allowed are null and an integer in [1, inf)"


def _weights_that_may_differ(config: DictConfig) -> Problems:
    """Weights are named, or a pattern of theirs is."""
    names = config["eval"]["allow_missing"]
    if not isinstance(names, ListConfig) or not all(isinstance(name, str) for name in names):
        yield (
            "eval.allow_missing",
            "allowed is a list of names of weights, such as [backbone.output_layer.*]",
        )


def _kv_cache(config: DictConfig) -> Problems:
    """Keys and values can be kept only where later tokens cannot change them."""
    name = config["algo"]["name"]
    if config["sampling"]["kv_cache"] and name not in ("ar", "bd3lm"):
        yield (
            "sampling.kv_cache",
            f"allowed with algo.name={name} is False: later tokens change its keys and values",
        )
    if config["sampling"]["compile"] and not config["sampling"]["kv_cache"]:
        yield (
            "sampling.compile",
            "allowed with sampling.kv_cache=false is False: passes over a cache are compiled",
        )


def _automatic_batch_size(config: DictConfig) -> Problems:
    """A batch size is found for training; it divides what a device computes in a step."""
    loader, trainer = config["loader"], config["trainer"]
    if loader["batch_size"] != "auto":
        return
    if "train" not in _modes(config):
        yield "loader.batch_size", f"allowed with mode={config['mode']} is an integer in [1, inf)"
    if trainer["accumulate_grad_batches"] != 1:
        yield (
            "trainer.accumulate_grad_batches",
            "allowed with loader.batch_size=auto is the default, which follows from what is found",
        )
    world = world_size(trainer)
    if loader["global_batch_size"] % world:
        yield (
            "loader.global_batch_size",
            f"allowed with loader.batch_size=auto are multiples of the {world} devices",
        )


def _global_batch(config: DictConfig) -> Problems:
    """An optimizer step takes the global batch exactly."""
    loader, trainer = config["loader"], config["trainer"]
    if loader["batch_size"] == "auto":
        return
    world = world_size(trainer)
    at_once = loader["batch_size"] * world
    wanted, accumulate = loader["global_batch_size"], trainer["accumulate_grad_batches"]
    if "train" in _modes(config) and at_once * accumulate != wanted:
        if wanted % at_once == 0:
            remedy = f"trainer.accumulate_grad_batches={wanted // at_once}"
        else:
            near = {max(1, wanted // at_once) * at_once, div_up(wanted, at_once) * at_once}
            remedy = f"loader.global_batch_size={' or '.join(map(str, sorted(near)))}"
            if wanted % world == 0:
                remedy += f" or a loader.batch_size that divides {wanted // world}"
        yield (
            "loader.global_batch_size",
            f"loader.batch_size={loader['batch_size']} x {world // trainer['num_nodes']} devices x "
            f"trainer.num_nodes={trainer['num_nodes']} x "
            f"trainer.accumulate_grad_batches={accumulate} = {at_once * accumulate} rows; "
            f"allowed and near is {remedy}",
        )


# In this order: what a rule reads has been checked by the ones before it.
RULES: tuple[Callable[[DictConfig], Problems], ...] = (
    _choices,
    _following_modes,
    _devices,
    _numbers,
    _flags,
    _compile,
    _fractions,
    _block_divides_length,
    _head_size,
    _algo_combination,
    _blocks_need_bd3lm,
    _block_attention,
    _loss_scale,
    _clipped_range,
    _resampling,
    _clip_search_widths,
    _flex_needs_gpu_to_train,
    _sampling_steps,
    _sampling_without_time,
    _sampling_texts,
    _weights_that_may_differ,
    _kv_cache,
    _automatic_batch_size,
    _global_batch,
)


def validate(config: DictConfig) -> None:
    """Refuses a run that cannot work, before anything is loaded.

    Args:
        config: the composed configuration.

    Raises:
        ValueError: the first problem, as `key=value: what is allowed`.
    """
    for rule in RULES:
        for key, allowed in rule(config):
            raise ValueError(f"{key}={_value(config, key)}: {allowed}")


def config_hash(config: DictConfig) -> str:
    """Sixteen hex digits of the resolved configuration."""
    resolved = json.dumps(OmegaConf.to_container(config, resolve=True), sort_keys=True)
    return hashlib.sha256(resolved.encode()).hexdigest()[:16]
