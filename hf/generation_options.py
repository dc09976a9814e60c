"""What `generate` is asked for, by transformers' names or by this project's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from sampling.options import SMALL_VOCABULARY, SamplingOptions

from .configuration_bd3lm import BD3LMConfig

OPTIONS = tuple(field.name for field in dataclasses.fields(SamplingOptions))
LENGTHS = ("max_length", "max_new_tokens", "num_return_sequences", "pad_token_id",
           "return_dict_in_generate")  # fmt: skip
# transformers' names of what has another name or form here.
TRANSLATED = ("do_sample", "top_p", "use_cache", "bos_token_id", "eos_token_id", "tokenizer")
# Every model has these in its stored defaults; only who types them asks for something.
STORED_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What asks for nothing with this value; None and False never do.
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1, "length_penalty": 1,
    "typical_p": 1, "guidance_scale": 1, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "min_p": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "diversity_penalty": 0,
}  # fmt: skip
IGNORED = ("token_type_ids", "use_model_defaults", "synced_gpus", "disable_compile",
           "transformers_version")  # fmt: skip


def asked_for(
    typed: Mapping[str, Any],
    *,
    given: GenerationConfig | None,
    stored: GenerationConfig | None,
    config: BD3LMConfig,
) -> dict[str, Any]:
    """All options by this project's names; what is typed wins over `given`, and that over `stored`.

    Args:
        typed: arguments of `generate` by any of their names.
        given: its `generation_config`.
        stored: the model's `generation_config`, whose ids of special tokens ask for nothing.
        config: of the model.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    values = {k: v for k, v in _values(stored).items() if k not in STORED_IDS} | _values(given)
    if typed.get("do_sample") is not None and typed.get("temperature") is not None:
        if typed["do_sample"] == (typed["temperature"] == 0):
            raise ValueError(
                f"generate(do_sample={typed['do_sample']}, temperature={typed['temperature']}): "
                "do_sample=False takes the most probable token, which is temperature=0; give one"
            )
    if typed.get("temperature") is not None:
        values.pop("do_sample", None)
    values |= {k: v for k, v in typed.items() if v is not None or k in OPTIONS}
    found = {}
    for name, value in values.items():
        if name in OPTIONS or name in LENGTHS:
            found[name] = value
        elif name not in TRANSLATED and name not in IGNORED and not _is_neutral(name, value):
            raise ValueError(
                f"generate({name}={value!r}): this sampler has none; allowed are "
                f"{', '.join((*OPTIONS, *LENGTHS, *TRANSLATED))}"
            )
    return found | _translated(values, config=config)


def _values(config: GenerationConfig | None) -> dict[str, Any]:
    values = {} if config is None else config.to_diff_dict()
    return {k: v for k, v in values.items() if not k.startswith("_") and v is not None}


def _is_neutral(name: str, value: Any) -> bool:
    return value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name])


def _translated(values: Mapping[str, Any], *, config: BD3LMConfig) -> dict[str, Any]:
    """What transformers' names mean here, where this project's own are not given."""
    found = {}
    if values.get("do_sample") is False:
        found["temperature"] = 0
    if values.get("top_k") == 0:
        found["top_k"] = None
    if values.get("top_p") is not None:
        if "nucleus_p" in values:
            raise ValueError(
                f"generate(top_p={values['top_p']}, nucleus_p={values['nucleus_p']}): give one; "
                "top_p is nucleus_p with nucleus_rule='standard'"
            )
        found["nucleus_p"] = values["top_p"]
        found["nucleus_rule"] = values.get("nucleus_rule", "standard")
    if values.get("use_cache") and "kv_cache" not in values:
        is_subs = config.parameterization == "subs"
        found["kv_cache"] = config.parameterization == "ar" or (is_subs and config.cross_attn)
    if values.get("tokenizer") is not None and values.get("decode") is None:
        found["decode"] = values["tokenizer"].decode
    if isinstance(values.get("stop_strings"), str):
        found["stop_strings"] = (values["stop_strings"],)
    for name, instead in (
        ("bos_token_id", "input_ids may begin with another token"),
        ("eos_token_id", "stop_strings ends a text elsewhere"),
    ):
        _check_id(name, values.get(name), own=getattr(config, name), instead=instead)
    if values.get("eos_token_id") is not None and "stop_on_eos" not in values:
        found["stop_on_eos"] = True
    return found


def _check_id(name: str, value: Any, *, own: int, instead: str) -> None:
    if value not in (None, own, [own], (own,)):
        raise ValueError(f"generate({name}={value}): allowed is this model's {own}; {instead}")


def sampling_options(options: Mapping[str, Any], *, config: BD3LMConfig) -> SamplingOptions:
    """These options; the entropy rule is off where the vocabulary is small.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    if config.vocab_size < SMALL_VOCABULARY:
        options = {"min_entropy": None, **options}
    found = SamplingOptions(**options)
    is_on_grid = config.parameterization == "sedd" or (
        config.parameterization == "subs"
        and not found.first_hitting
        and found.confidence_threshold is None
    )
    if is_on_grid and found.num_steps < 1:
        raise ValueError(
            f"num_steps={found.num_steps}: allowed are integers from 1, this sampler takes steps"
        )
    return found
