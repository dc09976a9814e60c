"""Generation arguments of lm-eval as options of the samplers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sampling.options import SamplingOptions
from sampling.stopping import Decode

# Arguments that are no keys under `sampling`, and those that are.
HEEDED = ("do_sample", "max_gen_toks", "until")
OPTIONS = {field.name for field in dataclasses.fields(SamplingOptions)} - {"decode", "stop_strings"}


def asked_options(
    options: SamplingOptions, asked: Mapping[str, Any], *, room: int, decode: Decode
) -> SamplingOptions:
    """The options of a run with what a task, or `--gen_kwargs`, asks for.

    Args:
        options: the keys under `sampling`.
        asked: what `lm_eval.models.utils.normalize_gen_kwargs` returns.
        room: the most tokens that a row has behind its BOS.
        decode: the text of a list of tokens.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    size = asked["max_gen_toks"]
    if not 1 <= size <= room:
        raise ValueError(
            f"max_gen_toks={size}: allowed are 1 to {room}, one less than model.length"
        )
    changes = {name: value for name, value in asked.items() if name not in HEEDED}
    if not asked["do_sample"]:
        changes["temperature"] = 0
    if "top_p" in changes:
        changes |= {"nucleus_p": changes.pop("top_p"), "nucleus_rule": "standard"}
    if "top_k" in changes:
        changes["top_k"] = changes["top_k"] or None  # 0 keeps all
    if changes.get("num_beams") == 1:
        del changes["num_beams"]
    for name in changes.keys() - OPTIONS:
        allowed = ", ".join((*HEEDED, "top_p", *sorted(OPTIONS)))
        raise ValueError(f"--gen_kwargs {name}={changes[name]}: allowed are {allowed}")
    return dataclasses.replace(
        options,
        stop_on_eos=True,
        stop_strings=tuple(text for text in asked["until"] if text),
        decode=decode,
        **changes,
    )
