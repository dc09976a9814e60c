"""The loss of the Hugging Face model: the bound that `mode=ppl_eval` reports, of one draw."""

from dataclasses import replace

import torch
from torch import Tensor

from losses.objectives import masked_mean
from losses.token_losses import TokenLosses


def nelbo(
    token_losses: TokenLosses,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None,
    seed: int | None,
) -> Tensor:
    """The NELBO per token in nats over the full range of t (paper eq. 8); of ar the exact NLL.

    Args:
        token_losses: those of the model; a row shorter than its blocks is one block.
        input_ids: tokens (B, N), read where there is no label.
        labels: clean tokens (B, N), -100 where one carries no loss. Position 0 never does and stays
            clean.
        attention_mask: 0 where a token carries no loss either, (B, N).
        seed: of t and x_t; None: torch's own stream.

    Returns:
        A scalar.

    Raises:
        ValueError: if a row is no multiple of L, or there is not one label for each token.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}: allowed is that of input_ids, "
            f"{tuple(input_ids.shape)}; the loss needs no [x_t ; x_0]"
        )
    length, is_ar = labels.shape[1], token_losses.denoiser.parameterization == "ar"
    block_size = min(token_losses.block_size, length)
    if length % block_size and not is_ar:
        raise ValueError(
            f"labels: rows of {length} tokens, allowed are multiples of block_size={block_size}"
        )
    has_loss = labels != -100
    x_0 = labels.where(has_loss, input_ids)
    if attention_mask is not None:
        has_loss = has_loss & attention_mask.bool()
    generator = None if seed is None else torch.Generator(x_0.device).manual_seed(seed)
    losses = replace(token_losses, block_size=block_size)(x_0, generator=generator)
    if is_ar:
        return masked_mean(losses, mask=has_loss[:, 1:])
    is_first = torch.arange(length, device=x_0.device) == 0
    return masked_mean(losses, mask=has_loss & ~is_first)
