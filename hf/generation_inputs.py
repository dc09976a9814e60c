"""Prompts as a canvas of given tokens and masks; and what was drawn, padded as they were."""

from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_bd3lm import BD3LMConfig


class Prompts(NamedTuple):
    """Prompts without padding before them.

    Attributes:
        tokens: (B, P) int64, each row's at its beginning.
        lengths: how many of them are the prompt's, (B,).
        padding: how many tokens of padding were before it, (B,).
    """

    tokens: Tensor
    lengths: Tensor
    padding: Tensor


def read_prompts(
    prompts: Tensor, attention_mask: Tensor | None, *, config: BD3LMConfig, copies: int = 1
) -> Prompts:
    """Prompts that begin with BOS; it goes before all of them where one does not.

    Args:
        prompts: tokens (B, P); P may be 0. A tokenizer's empty tensor is of floats.
        attention_mask: 0 where there is padding, before or behind the prompts, (B, P).
        config: ids.
        copies: of each prompt, one after the other.

    Raises:
        ValueError: ids that are none, a mask of another shape, or with padding between tokens.
    """
    if prompts.ndim != 2:
        raise ValueError(f"input_ids of shape {tuple(prompts.shape)}: allowed is (B, P)")
    prompts = prompts.long()
    if prompts.numel() and not 0 <= prompts.min() <= prompts.max() < config.vocab_size:
        raise ValueError(
            f"input_ids: ids from {int(prompts.min())} to {int(prompts.max())}, allowed are 0 to "
            f"{config.vocab_size - 1}"
        )
    given = torch.ones_like(prompts) if attention_mask is None else attention_mask.long()
    if given.shape != prompts.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(given.shape)}: allowed is that of input_ids, "
            f"{tuple(prompts.shape)}"
        )
    prompts, given = (x.repeat_interleave(copies, dim=0) for x in (prompts, given))
    begins = torch.nn.functional.pad(given, (1, 0)).diff(dim=1) > 0
    if (begins.sum(dim=1) > 1).any():
        raise ValueError(
            "attention_mask: allowed is padding before or behind a prompt, not within it; "
            f"config.mask_index={config.mask_index} in input_ids marks what is to be filled"
        )
    lengths = given.sum(dim=1)
    padding = (begins.long().cumsum(dim=1) == 0).sum(dim=1).where(lengths > 0, 0)
    tokens = prompts.gather(1, given.argsort(dim=1, descending=True, stable=True))
    is_empty = lengths == 0
    has_bos = is_empty if tokens.shape[1] == 0 else is_empty | (tokens[:, 0] == config.bos_token_id)
    if tokens.shape[1] == 0 or is_empty.all() or not has_bos.all():
        tokens = torch.nn.functional.pad(tokens, (1, 0), value=config.bos_token_id)
        return Prompts(tokens, lengths + 1, padding)
    tokens[:, 0] = config.bos_token_id  # of empty ones too
    return Prompts(tokens, lengths.clamp(min=1), padding)


def prompt_canvas(
    prompts: Prompts,
    *,
    config: BD3LMConfig,
    max_length: int | None,
    max_new_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """Rows of given tokens and masks, and where each ends at the latest.

    Args:
        prompts: see `read_prompts`; `config.mask_index` where a gap is to be filled.
        config: ids, and the block size.
        max_length: tokens of a row with BOS and prompt. None: the model's length, or, with
            `max_new_tokens`, as many as these make.
        max_new_tokens: behind each prompt; None: up to `max_length`.

    Returns:
        canvas (B, N) int64, N whole blocks, and limits (B,) int64.

    Raises:
        ValueError: a prompt that does not fit, or a length that is none.
    """
    asked = (("max_length", max_length, 1), ("max_new_tokens", max_new_tokens, 0))
    for name, value, least in asked:
        if value is not None and value < least:
            raise ValueError(f"generate({name}={value}): allowed are integers from {least}")
    lengths = prompts.lengths
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
    shape = (len(lengths), _whole_blocks(int(limits.max()), config=config))
    canvas = torch.full(shape, config.mask_index, device=lengths.device)
    width = min(shape[1], prompts.tokens.shape[1])  # beyond it there is padding alone
    is_given = torch.arange(width, device=lengths.device) < lengths[:, None]
    canvas[:, :width] = prompts.tokens[:, :width].where(is_given, config.mask_index)
    return canvas, limits


def _whole_blocks(length: int, *, config: BD3LMConfig) -> int:
    """The number of tokens of as many blocks as hold `length`."""
    unit = config.block_size
    if not config.cross_attn and length > unit:
        unit = max(1, unit // 2)  # mdlm goes on by half a window
    return -(-length // unit) * unit


def padded_as_prompts(
    tokens: Tensor, *, lengths: Tensor, padding: Tensor, pad: int, width: int
) -> Tensor:
    """Drawn rows with their padding where the prompts had it, so that these end where they did.

    Args:
        tokens: (B, N).
        lengths: of the texts, (B,).
        padding: tokens before each text, (B,).
        pad: id of padding.
        width: of the result without what is before the texts.

    Returns:
        (B, width and the largest padding).
    """
    places = torch.arange(width + int(padding.max()), device=tokens.device) - padding[:, None]
    is_text = (places >= 0) & (places < lengths[:, None])
    return tokens.gather(1, places.clamp(0, tokens.shape[1] - 1)).where(is_text, pad)
