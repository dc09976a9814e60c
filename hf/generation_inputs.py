"""What `generate` is asked for, as samplers take it: options, and prompts as a canvas."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sampling.options import SMALL_VOCABULARY, SamplingOptions

from .configuration_bd3lm import BD3LMConfig


def sampling_options(options: Mapping[str, Any], *, config: BD3LMConfig) -> SamplingOptions:
    """The options with these names; the entropy rule is off where the vocabulary is small.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    known = [field.name for field in dataclasses.fields(SamplingOptions)]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"generate({name}={value!r}): allowed are {', '.join(known)}")
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


def prompt_canvas(
    prompts: Tensor,
    attention_mask: Tensor | None,
    *,
    config: BD3LMConfig,
    max_length: int | None,
    max_new_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """Rows of given tokens and masks, and where each ends at the latest.

    Args:
        prompts: tokens (B, P), `config.mask_index` where a gap is to be filled. BOS goes before
            them where they do not all begin with it.
        attention_mask: 0 behind the end of a prompt that is shorter than others, (B, P).
        config: ids, and the block size.
        max_length: tokens of a row with BOS and prompt. None: the model's length, or, with
            `max_new_tokens`, as many as these make.
        max_new_tokens: behind each prompt; None: up to `max_length`.

    Returns:
        canvas (B, N) int64, N whole blocks, and limits (B,) int64.

    Raises:
        ValueError: padding on the left, or a prompt that does not fit.
    """
    given = torch.ones_like(prompts) if attention_mask is None else attention_mask.long()
    if (given.diff(dim=1) > 0).any() or not given[:, 0].all():
        raise ValueError("attention_mask: allowed is padding behind the prompts, not before them")
    if (prompts[:, 0] != config.bos_token_id).any():
        prompts = torch.nn.functional.pad(prompts, (1, 0), value=config.bos_token_id)
        given = torch.nn.functional.pad(given, (1, 0), value=1)
    lengths = given.sum(dim=1)
    if max_length is None and max_new_tokens is None:
        max_length = config.model_length
    limits = lengths.new_full(lengths.shape, max_length or 0)
    if max_new_tokens is not None:
        limits = lengths + max_new_tokens
        limits = limits if max_length is None else limits.clamp(max=max_length)
    if (lengths > limits).any():
        raise ValueError(
            f"input_ids: a prompt of {int(lengths.max())} tokens with BOS, allowed are up to "
            f"max_length={max_length}"
        )
    shape = (len(prompts), _whole_blocks(int(limits.max()), config=config))
    canvas = torch.full(shape, config.mask_index, device=prompts.device)
    width = min(shape[1], prompts.shape[1])  # beyond it there is padding alone
    canvas[:, :width] = prompts.where(given.bool(), config.mask_index)[:, :width]
    return canvas, limits


def _whole_blocks(length: int, *, config: BD3LMConfig) -> int:
    """The number of tokens of as many blocks as hold `length`."""
    unit = config.block_size
    if not config.cross_attn and length > unit:
        unit = max(1, unit // 2)  # mdlm goes on by half a window
    return -(-length // unit) * unit
