"""What each key of the configuration may be on its own, and the rules that look it up.

A rule yields the keys that are wrong and what is allowed instead.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from checkpointing.description import PARAMETERIZATIONS
from configuration.resolvers import devices_per_node
from configuration.training_request import lightning_precision
from likelihood.estimators import NAMES

Problems = Iterator[tuple[str, str]]
Rule = Callable[[DictConfig], Problems]


# --- tables of allowed values ---------------------------------------------------------------

# algo.name -> algo.sampler
SAMPLERS = {
    "ar": "ar",
    "bd3lm": "semi_ar",
    "mdlm": "semi_ar",
    "sedd": "analytic",
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("train", "ppl_eval", "sample_eval"),
    "algo.name": tuple(SAMPLERS),
    "algo.parameterization": tuple(dict.fromkeys(PARAMETERIZATIONS.values())),
    "algo.backbone": ("dit", "hf_dit"),
    "algo.sampler": tuple(dict.fromkeys(SAMPLERS.values())),
    "noise.type": ("loglinear", "square", "square_root", "log", "cosine"),
    "model.attn_backend": ("flash_attn", "auto", "flex", "sdpa"),
    "training.activation_checkpointing": ("none", "blocks"),
    "eval.likelihood": NAMES,
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
    "eval.num_draws": (int, "[1, inf)"),
    "eval.num_orders": (int, "[1, inf)"),
    "eval.tokens_per_pass": (int, "[1, inf)"),
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
    "data.num_proc": (int, "[1, inf)"),
    "data.shuffle_buffer": (int, "[0, inf)"),
}

# Arguments of Lightning's trainer that have no key but can be added (`+trainer.NAME=`), each with
# what is allowed where the trainer would take more or less. All others are as in Lightning.
_SWITCHES_OF_TRAINER = (
    "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "barebones", "logger",
    "detect_anomaly",
)  # fmt: skip
_SAID_ELSEWHERE = {
    "callbacks": "+callbacks.NAME={_target_: ...} adds one",
    "strategy": "strategy=ddp and the other files of configs/strategy say it",
    "plugins": "checkpoints are written by a plugin of this code",
}
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")

_FLAGS = (
    "sampling.var_length",
    "sampling.first_hitting",
    "sampling.kv_cache",
    "sampling.stop_on_eos",
    "eval.any_block_size",
    "sampling.live",
    "training.antithetic_sampling",
    "training.resample",
    "training.eval_nll",
    "training.tf32",
    "eval.disable_ema",
    "algo.time_conditioning",
    "algo.ignore_bos",
    "algo.cross_attn",
    "algo.var_min",
    "algo.fix_clipping",
    "algo.mdlm_loss_scale",
    "model.adaln",
    "checkpointing.resume_from_ckpt",
    "data.wrap",
    "data.streaming",
    "loader.pin_memory",
)

_TEXTS = (
    "data.train",
    "data.valid",
    "data.tokenizer_name_or_path",
    "data.cache_dir",
    "data.document",
    "checkpointing.save_dir",
    "eval.checkpoint_path",
    "sampling.logdir",
)
_TEXTS_OR_NULL = (
    "data.path",
    "data.train_path",
    "data.valid_path",
    "data.revision",
    "data.text_column",
    "checkpointing.resume_ckpt_path",
    "eval.gen_ppl_eval_model_name_or_path",
    "eval.results_path",
    "sampling.prompts",
    "sampling.infill",
    "sampling.trace",
    "training.from_pretrained",
)

def value_of(config: DictConfig, key: str) -> Any:
    """Returns the value at a dotted key, with its interpolation resolved."""
    node = config
    for part in key.split("."):
        node = node[part]
    return node


def lies_in(value: float, interval: str) -> bool:
    """Tells whether a number lies in an interval such as "(0, 1]"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def is_number(value: Any, kind: type) -> bool:
    """Tells whether a value is an int, or also a float where `kind` is float; never a bool."""
    return type(value) is int or (kind is float and type(value) is float)


# --- rules -----------------------------------------------------------------------------------


def _choices(config: DictConfig) -> Problems:
    """A name is one of the known ones."""
    for key, allowed in _CHOICES.items():
        if value_of(config, key) not in allowed:
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
        value = value_of(config, key)
        if key == "loader.batch_size" and value == "auto":  # `combinations` has rules of its own
            continue
        if not is_number(value, kind) or not lies_in(value, interval):
            yield key, f"allowed is {'an integer' if kind is int else 'a number'} in {interval}"


def _flags(config: DictConfig) -> Problems:
    """A switch is true or false."""
    for key in _FLAGS:
        if type(value_of(config, key)) is not bool:
            yield key, "allowed are true and false"


def _texts(config: DictConfig) -> Problems:
    """A name or a path is a text; Hydra reads 1.5 and true as something else."""
    for key in _TEXTS + _TEXTS_OR_NULL:
        value, is_optional = value_of(config, key), key in _TEXTS_OR_NULL
        if not (isinstance(value, str) and value) and not (is_optional and value is None):
            yield key, f"allowed {'are null and' if is_optional else 'is'} a text that is not empty"


def _places_of_callbacks(config: DictConfig) -> Problems:
    """Where a callback writes is a text; Lightning's find out late, and say it badly."""
    for name in config["callbacks"] or ():
        place = f"callbacks.{name}.dirpath"
        if not isinstance(OmegaConf.select(config, place), str | None):
            yield place, "allowed are null and a text"


def _clipping(config: DictConfig) -> Problems:
    """Gradients are clipped to a number, or not."""
    value = config["trainer"].get("gradient_clip_val")
    if value is not None and not (is_number(value, float) and lies_in(value, "[0, inf)")):
        yield "trainer.gradient_clip_val", "allowed are null and a number in [0, inf)"


def _compile(config: DictConfig) -> Problems:
    """Switches that have a third position."""
    for section, third in (("training", "auto"), ("sampling", "graphs")):
        value = config[section]["compile"]
        if type(value) is not bool and value != third:
            yield f"{section}.compile", f"allowed are true, false and {third}"


def _fractions(config: DictConfig) -> Problems:
    """A float number of batches is a fraction of the data set, as in Lightning."""
    for key in ("limit_train_batches", "limit_val_batches", "val_check_interval"):
        value = config["trainer"][key]
        if type(value) is float and value > 1.0:
            yield f"trainer.{key}", "allowed are an integer (batches) and a float <= 1 (a fraction)"


def _trainer_flags(config: DictConfig) -> Problems:
    """What Lightning's trainer takes beside the keys that there are, and this code can heed."""
    trainer = config["trainer"]
    for name in _SWITCHES_OF_TRAINER:
        if type(trainer.get(name)) not in (bool, type(None)):
            yield f"trainer.{name}", "allowed are true and false"
    for name, where in _SAID_ELSEWHERE.items():
        if trainer.get(name) is not None:
            yield f"trainer.{name}", f"allowed is null; {where}"
    if trainer.get("use_distributed_sampler"):
        yield "trainer.use_distributed_sampler", "allowed is false: each rank loads its own rows"
    rehearsed = trainer.get("fast_dev_run")
    if type(rehearsed) not in (bool, type(None)) and (type(rehearsed) is not int or rehearsed < 0):
        yield "trainer.fast_dev_run", "allowed are true, false and an integer in [0, inf)"
    repeated = trainer.get("overfit_batches")
    is_none = repeated is None
    if not is_none and not (is_number(repeated, float) and lies_in(repeated, "[0, inf)")):
        yield "trainer.overfit_batches", "allowed is a number in [0, inf)"
    if type(repeated) is float and repeated > 1.0:
        yield "trainer.overfit_batches", "allowed are an integer and a float <= 1 (a fraction)"


def _precision(config: DictConfig) -> Problems:
    """The network keeps its weights, and computes in float32 what lower precision would spoil."""
    if lightning_precision(config["trainer"]["precision"]) not in _PRECISIONS:
        yield "trainer.precision", f"allowed are {', '.join(_PRECISIONS)}, and short 32, 16, bf16"


def _weights_that_may_differ(config: DictConfig) -> Problems:
    """Weights are named, or a pattern of theirs is."""
    names = config["eval"]["allow_missing"]
    if not isinstance(names, ListConfig) or not all(isinstance(name, str) for name in names):
        yield (
            "eval.allow_missing",
            "allowed is a list of names of weights, such as [backbone.output_layer.*]",
        )


RULES: tuple[Rule, ...] = (
    _choices,
    _following_modes,
    _devices,
    _numbers,
    _flags,
    _texts,
    _places_of_callbacks,
    _clipping,
    _compile,
    _fractions,
    _trainer_flags,
    _precision,
    _weights_that_may_differ,
)
