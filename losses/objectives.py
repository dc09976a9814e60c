"""Losses per token, from what the network says of clean tokens.

Only masked positions carry loss in the diffusion objectives, so only their logits are computed, and
never all of them at once.
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

    Returns:
        (B, N) float32.
    """
    takes_both = pattern is AttentionPattern.BLOCK_DIFFUSION and clean is None
    masked = x_t == denoiser.mask_index
    sigma = (-torch.log1p(-values.move_chance)).clamp(max=sigma_max)
    scores = denoiser.target_scores(
        torch.cat((x_t, x_0), dim=1) if takes_both else x_t,
        sigma.squeeze(1) if sigma.shape[1] == 1 else sigma,
        tokens=x_0[masked],
        pattern=pattern,
        kv_cache=clean,
        logits_at=masked,
    )  # each (n_masked,)
    scaling = values.loss_scaling.expand_as(x_0)[masked]
    if denoiser.parameterization == "sedd":
        sigma = sigma.expand_as(x_0)[masked]
        entropy = score_entropy(scores, sigma=sigma, vocab_size=denoiser.backbone.config.vocab_size)
        terms = -scaling * torch.expm1(sigma) * entropy
    else:
        terms = scaling * scores.log_p
    return terms.new_zeros(x_0.shape).masked_scatter(masked, terms)


def masked_mean(losses: Tensor, *, mask: Tensor) -> Tensor:
    """sum(loss * mask) / sum(mask), a scalar, for (B, N) losses and a 0/1 mask."""
    return (losses * mask).sum() / mask.sum()
