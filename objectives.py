"""From the network's logits to probabilities, and from probabilities to losses.

Three parameterizations (paper sections 2 and 3, and the SEDD paper, arXiv 2310.16834):

- `subs`: log p(x_0 | x_t); no mass on the mask token, and what is not masked is known.
- `sedd`: the log score, log of the ratio p_t(y) / p_t(x_t) of each token y.
- `ar`: log p of the next token.

Only masked positions carry loss in the diffusion objectives, so only their logits are computed.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dit import DIT
from models.inference import InferenceDIT
from models.kv_cache import KVCache
from models.masks import AttentionPattern
from models.static_inference import StaticInferenceDIT
from noise_schedule import NoiseValues

PARAMETERIZATIONS = ("subs", "sedd", "ar")
# Stands for minus infinity where arithmetic with infinities would make NaN.
NEG_INFINITY = -1e6


def without_mask_token(logits: Tensor, *, mask_index: int) -> Tensor:
    """Float32 logits (..., V) in which the mask token has no probability."""
    logits = logits.float()
    column = torch.arange(logits.shape[-1], device=logits.device) == mask_index
    return logits.masked_fill(column, NEG_INFINITY)


def token_log_probs(logits: Tensor, *, mask_index: int) -> Tensor:
    """log p of a token that is not known yet, (..., V): the next one, or the one behind a mask."""
    return without_mask_token(logits, mask_index=mask_index).log_softmax(dim=-1)


def subs_log_probs(logits: Tensor, *, x_t: Tensor, mask_index: int) -> Tensor:
    """log p(x_0 | x_t), (..., V): zero masking probability and carry-over (paper section 2.2)."""
    log_p = token_log_probs(logits, mask_index=mask_index)
    known = torch.full_like(log_p, NEG_INFINITY).scatter(-1, x_t[..., None], 0.0)
    return torch.where((x_t == mask_index)[..., None], log_p, known)


def sedd_log_score(logits: Tensor, *, x_t: Tensor, sigma: Tensor) -> Tensor:
    """log of the ratio p_t(y) / p_t(x_t), (..., V); 0 at y = x_t.

    Args:
        logits: (..., V).
        x_t: observed tokens (...).
        sigma: total noise, broadcastable to x_t.
    """
    # log(e^sigma - 1), in the form that neither over- nor underflows
    log_expm1 = sigma + torch.log(-torch.expm1(-sigma))
    score = logits.float() - log_expm1[..., None] - math.log(logits.shape[-1] - 1)
    return score.scatter(-1, x_t[..., None], 0.0)


def score_entropy(log_score: Tensor, *, x_0: Tensor, sigma: Tensor, mask_index: int) -> Tensor:
    """Score entropy at masked positions (SEDD paper, eq. 5 for the absorbing process).

    sum over y != mask of e^score(y), minus q score(x_0), plus q (log q - 1), q = 1 / (e^sigma - 1).

    Args:
        log_score: (..., V) at positions that are masked.
        x_0: the tokens behind the masks (...).
        sigma: total noise (...).
    """
    ratio = 1 / torch.expm1(sigma)
    scores = log_score.exp()
    positive = scores.sum(dim=-1) - scores[..., mask_index]
    true_score = log_score.gather(-1, x_0[..., None]).squeeze(-1)
    return positive - ratio * true_score + ratio * (ratio.log() - 1)


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The network and the way its logits are read. Losses and samplers share it.

    A plain callable, so that the network keeps its checkpoint names.

    Args:
        backbone: the network, called as `DIT` is.
        parameterization: one of `PARAMETERIZATIONS`.
        mask_index: id of the mask token.
        time_conditioning: whether the network is told sigma; otherwise it always sees 0.
    """

    backbone: nn.Module
    parameterization: str
    mask_index: int
    time_conditioning: bool = False

    def logits(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        *,
        pattern: AttentionPattern,
        kv_cache: KVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """The network's logits; arguments as in `DIT.forward`."""
        return self.backbone(
            x,
            sigma if self.time_conditioning else None,
            pattern=pattern,
            kv_cache=kv_cache,
            logits_at=logits_at,
        )

    def for_sampling(self, *, compiled: bool = False) -> "Denoiser":
        """The same for inference, with the network in its fast form where sigma is always 0.

        Args:
            compiled: compile the passes over a KV cache, and make CUDA graphs of them on a GPU.
        """
        if self.time_conditioning or not isinstance(self.backbone, DIT):
            return self
        fast = InferenceDIT(self.backbone)
        return replace(self, backbone=StaticInferenceDIT(fast) if compiled else fast)

    def make_cache(self, batch_size: int, *, capacity: int) -> KVCache:
        """An empty KV cache for the network."""
        return self.backbone.make_cache(batch_size, capacity=capacity)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        *,
        pattern: AttentionPattern,
        kv_cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """log p(x_0 | x) for subs and ar, the log score for sedd, each (B, T, V) float32.

        Args:
            x: tokens (B, T); for `BLOCK_DIFFUSION` [x_t ; x_0], and the result is (B, N, V).
            sigma: total noise (B,), which sedd needs.
            pattern: who sees whom.
            kv_cache: the tokens before x.
            at: boolean, of the result's (B, T): only these positions, (n_selected, V). With subs
                they are masked ones.
        """
        logits = self.logits(x, sigma, pattern=pattern, kv_cache=kv_cache, logits_at=at)
        if self.parameterization == "ar" or (self.parameterization == "subs" and at is not None):
            return token_log_probs(logits, mask_index=self.mask_index)
        x_t = x[:, : logits.shape[1]] if at is None else x[:, : at.shape[1]][at]
        if self.parameterization == "subs":
            return subs_log_probs(logits, x_t=x_t, mask_index=self.mask_index)
        sigma = sigma[:, None].expand(x.shape)
        sigma = sigma[:, : logits.shape[1]] if at is None else sigma[:, : at.shape[1]][at]
        return sedd_log_score(logits, x_t=x_t, sigma=sigma)


def ar_token_losses(denoiser: Denoiser, x_0: Tensor) -> Tensor:
    """-log p(x_{i+1} | x_{<=i}), (B, N - 1), for tokens (B, N)."""
    logits = denoiser.logits(x_0[:, :-1], pattern=AttentionPattern.CAUSAL)
    logits = without_mask_token(logits, mask_index=denoiser.mask_index)
    losses = F.cross_entropy(logits.flatten(0, 1), x_0[:, 1:].flatten(), reduction="none")
    return losses.view_as(x_0[:, 1:])


def diffusion_token_losses(
    denoiser: Denoiser,
    x_0: Tensor,
    *,
    x_t: Tensor,
    values: NoiseValues,
    sigma_max: float,
    pattern: AttentionPattern,
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

    Returns:
        (B, N) float32.
    """
    is_block_diffusion = pattern is AttentionPattern.BLOCK_DIFFUSION
    masked = x_t == denoiser.mask_index
    sigma = (-torch.log1p(-values.move_chance)).clamp(max=sigma_max)
    logits = denoiser.logits(
        torch.cat((x_t, x_0), dim=1) if is_block_diffusion else x_t,
        sigma.squeeze(1) if sigma.shape[1] == 1 else sigma,
        pattern=pattern,
        logits_at=masked,
    )  # (n_masked, V)
    target = x_0[masked]
    scaling = values.loss_scaling.expand_as(x_0)[masked]
    if denoiser.parameterization == "sedd":
        sigma = sigma.expand_as(x_0)[masked]
        log_score = sedd_log_score(logits, x_t=x_t[masked], sigma=sigma)
        entropy = score_entropy(
            log_score, x_0=target, sigma=sigma, mask_index=denoiser.mask_index
        )
        terms = -scaling * torch.expm1(sigma) * entropy
    else:
        logits = without_mask_token(logits, mask_index=denoiser.mask_index)
        terms = -scaling * F.cross_entropy(logits, target, reduction="none")
    return terms.new_zeros(x_0.shape).masked_scatter(masked, terms)


def masked_mean(losses: Tensor, *, mask: Tensor) -> Tensor:
    """sum(loss * mask) / sum(mask), a scalar, for (B, N) losses and a 0/1 mask."""
    return (losses * mask).sum() / mask.sum()
