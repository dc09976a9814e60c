"""Losses per token, from what the network says of clean tokens.

Only masked positions carry loss in the diffusion objectives, so only their logits are computed, and
never all of them at once. How many there are is known to the device alone, and asking it would make
the CPU wait: with a capacity nothing does.
"""

import math

import torch
from torch import Tensor

from models.denoiser import Denoiser, log_expm1
from models.kernels.chunked_head import TargetScores
from models.kv_cache import CleanHalf
from models.masks import AttentionPattern
from noise_schedule import NoiseValues


def score_entropy(scores: TargetScores, *, sigma: Tensor, vocab_size: int) -> Tensor:
    """Score entropy at masked positions (SEDD paper, eq. 5 for the absorbing process).

    sum over y != mask of e^score(y), minus q score(x_0), plus q (log q - 1), q = 1 / (e^sigma - 1).
    The score of y is its logit minus log(e^sigma - 1) and log(V - 1).

    Args:
        scores: logits of the tokens behind the masks, and their log-sums without the mask token.
        sigma: total noise (n,).
        vocab_size: V.
    """
    ratio = 1 / torch.expm1(sigma)
    offset = log_expm1(sigma) + math.log(vocab_size - 1)
    positive = (scores.log_sum - offset).exp()
    return positive - ratio * (scores.target - offset) + ratio * (ratio.log() - 1)


def ar_token_losses(denoiser: Denoiser, x_0: Tensor) -> Tensor:
    """-log p(x_{i+1} | x_{<=i}), (B, N - 1), for tokens (B, N)."""
    tokens = x_0[:, 1:]
    scores = denoiser.target_scores(x_0[:, :-1], tokens=tokens, pattern=AttentionPattern.CAUSAL)
    return -scores.log_p.view_as(tokens)


def diffusion_token_losses(
    denoiser: Denoiser,
    x_0: Tensor,
    *,
    x_t: Tensor,
    values: NoiseValues,
    sigma_max: float,
    pattern: AttentionPattern,
    clean: CleanHalf | None = None,
    capacity: int | None = None,
) -> Tensor:
    """The NELBO's terms, one per token; zero where the token is not masked.

    subs: loss_scaling log p(x_0) (paper eq. 8). sedd: sigma' times the score entropy, where
    sigma = -log(1 - p) and sigma' = -loss_scaling (e^sigma - 1).

    Args:
        denoiser: the network and its parameterization, subs or sedd.
        x_0, x_t: clean and noisy tokens (B, N).
        values: weight and masking probability, (B, 1) or (B, N).
        sigma_max: total noise at t = 1, the most the network has ever been told.
        pattern: `BLOCK_DIFFUSION` sees [x_t ; x_0], any other x_t alone.
        clean: of x_0, see `Denoiser.clean_half`; then the pass is over x_t alone, with x_0 and x_t
            of R times its rows.
        capacity: at least the number of masks, see `losses.capacity`. None: they are counted, the
            one thing here that waits for the device.

    Returns:
        (B, N) float32. With more masks than the capacity some are NaN: an error to be seen.
    """
    takes_both = pattern is AttentionPattern.BLOCK_DIFFUSION and clean is None
    masked = x_t == denoiser.mask_index
    at = masked_positions(masked, capacity=capacity)
    sigma = (-torch.log1p(-values.move_chance)).clamp(max=sigma_max)
    scores = denoiser.target_scores(
        torch.cat((x_t, x_0), dim=1) if takes_both else x_t,
        sigma.squeeze(1) if sigma.shape[1] == 1 else sigma,
        tokens=x_0.take(at),
        pattern=pattern,
        kv_cache=clean,
        logits_at=at,
    )  # each (n,)
    scaling = values.loss_scaling.expand_as(x_0).take(at)
    if denoiser.parameterization == "sedd":
        sigma = sigma.expand_as(x_0).take(at)
        entropy = score_entropy(scores, sigma=sigma, vocab_size=denoiser.backbone.config.vocab_size)
        terms = -scaling * torch.expm1(sigma) * entropy
    else:
        terms = scaling * scores.log_p
    if capacity is not None:
        terms = terms.masked_fill(~masked.take(at), 0.0)
        terms = terms.masked_fill(masked.sum() > capacity, torch.nan)
    return terms.new_zeros(x_0.numel()).index_copy(0, at, terms).view_as(x_0)


def masked_positions(masked: Tensor, *, capacity: int | None) -> Tensor:
    """Where masks are, as positions in the flattened (B, N), which rise: (n_masked,) int64.

    With a capacity (capacity,): tokens without a mask fill it up, behind the masks. No position
    comes twice, so that gradients that are put back never meet.
    """
    flat = masked.flatten()
    if capacity is None:
        return flat.nonzero()[:, 0]
    return (~flat).to(torch.uint8).argsort(stable=True)[:capacity]


def masked_mean(losses: Tensor, *, mask: Tensor) -> Tensor:
    """sum(loss * mask) / sum(mask), a scalar, for (B, N) losses and a 0/1 mask."""
    return (losses * mask).sum() / mask.sum()
