"""From the network's logits to probabilities, and from probabilities to losses.

Three parameterizations (paper sections 2 and 3, and the SEDD paper, arXiv 2310.16834):

- `subs`: log p(x_0 | x_t); no mass on the mask token, and what is not masked is known.
- `sedd`: the log score, log of the ratio p_t(y) / p_t(x_t) of each token y.
- `ar`: log p of the next token.

Only masked positions carry loss in the diffusion objectives, so only their logits are computed, and
never all of them at once.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.chunked_head import NEG_INFINITY, TargetScores
from models.dit import DIT, Target
from models.inference import InferenceDIT
from models.kv_cache import CleanHalf, KVCache
from models.masks import AttentionPattern
from models.static_inference import StaticInferenceDIT
from noise_schedule import NoiseValues


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


def log_expm1(sigma: Tensor) -> Tensor:
    """log(e^sigma - 1), in the form that neither over- nor underflows."""
    return sigma + torch.log(-torch.expm1(-sigma))


def sedd_log_score(logits: Tensor, *, x_t: Tensor, sigma: Tensor) -> Tensor:
    """log of the ratio p_t(y) / p_t(x_t), (..., V); 0 at y = x_t.

    Args:
        logits: (..., V).
        x_t: observed tokens (...).
        sigma: total noise, broadcastable to x_t.
    """
    score = logits.float() - log_expm1(sigma)[..., None] - math.log(logits.shape[-1] - 1)
    return score.scatter(-1, x_t[..., None], 0.0)


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


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """The network and the way its logits are read. Losses and samplers share it.

    A plain callable, so that the network keeps its checkpoint names.

    Args:
        backbone: the network, called as `DIT` is.
        parameterization: subs, sedd or ar.
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
        kv_cache: KVCache | CleanHalf | None = None,
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

    def target_scores(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        *,
        tokens: Tensor,
        pattern: AttentionPattern,
        kv_cache: CleanHalf | None = None,
        logits_at: Tensor | None = None,
    ) -> TargetScores:
        """What a loss needs to know of the logits of `tokens`; arguments as in `DIT.forward`."""
        return self.backbone(
            x,
            sigma if self.time_conditioning else None,
            pattern=pattern,
            kv_cache=kv_cache,
            logits_at=logits_at,
            target=Target(tokens, self.mask_index),
        )

    def clean_half(self, x_0: Tensor) -> CleanHalf:
        """What passes over any x_t see of x_0 (B, N), for block diffusion without gradients."""
        clean = CleanHalf()
        nowhere = torch.zeros_like(x_0, dtype=torch.bool)
        block_causal = AttentionPattern.BLOCK_CAUSAL
        self.logits(x_0, pattern=block_causal, kv_cache=clean, logits_at=nowhere)
        clean.commit()
        return clean

    def for_sampling(self, *, compiled: bool = False) -> "Denoiser":
        """The same for inference, with the network in its fast form where sigma is always 0.

        Args:
            compiled: compile the passes over a KV cache, and make CUDA graphs of them on a GPU.
        """
        if self.time_conditioning or not isinstance(self.backbone, DIT):
            return self
        fast = InferenceDIT(self.backbone, packs=not compiled)
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
