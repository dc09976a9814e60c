"""The loss of the Hugging Face model: the bound that `mode=ppl_eval` reports, of one draw."""

import torch
from torch import Tensor

from forward_process import FULL, noise_values, q_xt, sample_t
from models.masks import AttentionPattern
from noise_schedule import Noise
from objectives import Denoiser, ar_token_losses, diffusion_token_losses, masked_mean


def nelbo(
    denoiser: Denoiser,
    x_0: Tensor,
    *,
    has_loss: Tensor,
    noise: Noise,
    block_size: int,
    pattern: AttentionPattern,
    generator: torch.Generator | None,
) -> Tensor:
    """The NELBO per token in nats over the full range of t (paper eq. 8); of ar the exact NLL.

    Args:
        denoiser: the network and its parameterization.
        x_0: clean tokens (B, N); position 0 stays clean and carries no loss.
        has_loss: which tokens the mean runs over, (B, N) bool.
        noise: the schedule.
        block_size: L; a shorter row is one block.
        pattern: who sees whom in training.
        generator: of t and x_t, on the device of x_0; None: torch's own stream.

    Returns:
        A scalar.

    Raises:
        ValueError: if a row is no multiple of L.
    """
    if denoiser.parameterization == "ar":
        return masked_mean(ar_token_losses(denoiser, x_0), mask=has_loss[:, 1:])
    length = x_0.shape[1]
    block_size = min(block_size, length)
    if length % block_size:
        raise ValueError(
            f"labels: rows of {length} tokens, allowed are multiples of block_size={block_size}"
        )
    t = sample_t(
        (len(x_0), length // block_size),
        interval=FULL,
        antithetic=True,
        device=x_0.device,
        generator=generator,
    )  # (B, K)
    values = noise_values(noise, t, interval=FULL, mdlm_loss_scale=False)
    if t.shape[1] > 1:
        values = values.repeat_interleave(block_size)  # each (B, N); a single block: (B, 1)
    u = torch.rand(x_0.shape, device=x_0.device, generator=generator)
    x_t = q_xt(
        x_0,
        u=u,
        move_chance=values.move_chance,
        mask_index=denoiser.mask_index,
        ignore_bos=True,
    )
    losses = diffusion_token_losses(
        denoiser, x_0, x_t=x_t, values=values, sigma_max=noise.sigma_max, pattern=pattern
    )
    is_first = torch.arange(length, device=x_0.device) == 0
    return masked_mean(losses, mask=has_loss & ~is_first)
