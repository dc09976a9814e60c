"""Which values of several keys go together.

A rule yields the keys that are wrong and what is allowed instead. It reads what the rules of
`single_keys` have checked.
"""

import torch
from omegaconf import DictConfig, ListConfig

from checkpointing.description import PARAMETERIZATIONS
from configuration.likelihood_request import estimator_of
from configuration.resolvers import div_up, world_size
from configuration.single_keys import SAMPLERS, Problems, Rule, is_number, lies_in, value_of
from losses.forward_process import ClipInterval


def _modes(config: DictConfig) -> set[str]:
    """Returns every mode of the run."""
    return {config["mode"], *config["then"]}


def _evaluation_needs_batches(config: DictConfig) -> Problems:
    """0 switches validation off, which is all that an evaluation does."""
    if "ppl_eval" in _modes(config) and config["trainer"]["limit_val_batches"] == 0:
        yield "trainer.limit_val_batches", "allowed with mode=ppl_eval are positive numbers"


def _likelihood(config: DictConfig) -> Problems:
    """An algorithm has some of the likelihoods."""
    if "ppl_eval" in _modes(config):
        algo = config["algo"]
        for name, allowed in estimator_of(config).problems(
            parameterization=algo["parameterization"],
            block_size=config["block_size"],
            time_conditioning=algo["time_conditioning"],
        ):
            yield f"eval.{name}", allowed


def _modes_without_checkpoint(config: DictConfig) -> Problems:
    """What follows a training needs its checkpoint."""
    flags = {"fast_dev_run": False, "barebones": False, "enable_checkpointing": True}
    if "train" not in _modes(config) or _modes(config) == {"train"}:
        return
    for name, allowed in flags.items():
        if bool(config["trainer"].get(name, allowed)) != allowed:
            yield (
                f"trainer.{name}",
                f"allowed with mode={config['mode']} and then={config['then']}, which needs a "
                f"checkpoint, is {str(allowed).lower()}",
            )


def _bare_trainer(config: DictConfig) -> Problems:
    """Lightning's barebones logs nothing."""
    if config["trainer"].get("barebones") and "ppl_eval" in _modes(config):
        yield "trainer.barebones", "allowed with mode=ppl_eval, whose numbers are logged, is false"


def _overfitting(config: DictConfig) -> Problems:
    """A stream has no epoch that could be repeated."""
    if config["trainer"].get("overfit_batches") and config["data"]["streaming"]:
        yield "trainer.overfit_batches", "allowed with data.streaming=true is 0"


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
    for key, of_algo in (("parameterization", PARAMETERIZATIONS), ("sampler", SAMPLERS)):
        if config["algo"][key] != of_algo[name]:
            yield f"algo.{key}", f"allowed with algo.name={name} is {of_algo[name]}"


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
    size = config["block_size"]
    if config["training"]["resample"] and not ClipInterval(low, high).mask_counts(size):
        yield (
            "training.resample",
            f"allowed with block_size={size} are ranges that hold a multiple of 1/{size}, unlike "
            f"training.sampling_eps_min={low} to training.sampling_eps_max={high}",
        )


def _clip_search_widths(config: DictConfig) -> Problems:
    """A candidate width is a fraction, and with resampling wide enough to hold some count."""
    key, size = "algo.clip_search_widths", config["block_size"]
    widths = value_of(config, key)
    if not isinstance(widths, ListConfig):
        yield key, "allowed is a list of numbers in (0, 1)"
    if not all(is_number(width, float) and lies_in(width, "(0, 1)") for width in widths):
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


def _tokens_per_step(config: DictConfig) -> Problems:
    """Only first-hitting asks how many tokens a pass reveals."""
    sampler, sampling = config["algo"]["sampler"], config["sampling"]
    threshold = sampling["confidence_threshold"]
    is_asked = sampler == "semi_ar" and sampling["first_hitting"] and threshold is None
    if "sample_eval" in _modes(config) and sampling["tokens_per_step"] != 1 and not is_asked:
        yield (
            "sampling.tokens_per_step",
            f"allowed with algo.sampler={sampler}, sampling.first_hitting="
            f"{sampling['first_hitting']} and sampling.confidence_threshold={threshold} is 1",
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
    if limit is not None and sampling["infill"] is not None:
        yield "sampling.max_new_tokens", "allowed with sampling.infill, whose gaps say it, is null"


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
            "allowed with sampling.kv_cache=false is False: it is about passes over a cache",
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


RULES: tuple[Rule, ...] = (
    _evaluation_needs_batches,
    _likelihood,
    _modes_without_checkpoint,
    _bare_trainer,
    _overfitting,
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
    _tokens_per_step,
    _sampling_without_time,
    _sampling_texts,
    _kv_cache,
    _automatic_batch_size,
    _global_batch,
)
