"""The network and the way its logits are read.

Three parameterizations (paper sections 2 and 3, and the SEDD paper, arXiv 2310.16834):

- `subs`: log p(x_0 | x_t); no mass on the mask token, and what is not masked is known.
- `sedd`: the log score, log of the ratio p_t(y) / p_t(x_t) of each token y.
- `ar`: log p of the next token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .dit import DIT, Target
from .inference import InferenceDIT, can_be_read
from .kernels.chunked_head import NEG_INFINITY, TargetScores
from .kv_cache import CleanHalf, KVCache
from .masks import AttentionPattern
from .static_inference import StaticInferenceDIT


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

    def read(
        self,
        x: Tensor,
        *,
        tokens: Tensor,
        read: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        pattern: AttentionPattern,
        kv_cache: CleanHalf | None = None,
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """What `read` says of log p (m, V) and `tokens` (m,), for some positions after the other.

        For subs and ar, without sigma; arguments as in `DIT.forward`.
        """

        def of_log_probs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            return read(token_log_probs(logits, mask_index=self.mask_index), tokens)

        return self.backbone(
            x,
            pattern=pattern,
            kv_cache=kv_cache,
            logits_at=logits_at,
            target=Target(tokens, self.mask_index, of_log_probs),
        )

    def clean_half(self, x_0: Tensor) -> CleanHalf:
        """What passes over any x_t see of x_0 (B, N), for block diffusion without gradients."""
        clean = CleanHalf()
        nowhere = x_0.new_empty(0)  # positions, of which there are none
        block_causal = AttentionPattern.BLOCK_CAUSAL
        self.logits(x_0, pattern=block_causal, kv_cache=clean, logits_at=nowhere)
        clean.commit()
        return clean

    @property
    def has_static_passes(self) -> bool:
        """Whether passes over a KV cache are made for one batch size, see `StaticInferenceDIT`."""
        return isinstance(self.backbone, StaticInferenceDIT)

    def for_sampling(self, *, compiled: bool | str = False) -> "Denoiser":
        """The same for inference, with the network in its fast form where sigma is always 0.

        A network with adapters, quantized layers or hooks stays as it is: they count in a call.

        Args:
            compiled: True: compile the passes over a KV cache, and make CUDA graphs of them on a
                GPU. "graphs": the same without compiling them.
        """
        is_read = isinstance(self.backbone, DIT) and can_be_read(self.backbone)
        if self.time_conditioning or not is_read:
            return self
        fast = InferenceDIT(self.backbone, packs=compiled is not True)
        if compiled:
            fast = StaticInferenceDIT(fast, compiles=compiled is True)
        return replace(self, backbone=fast)

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
        at: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """log p(x_0 | x) for subs and ar, the log score for sedd, each (B, T, V) float32.

        Args:
            x: tokens (B, T); for `BLOCK_DIFFUSION` [x_t ; x_0], and the result is (B, N, V).
            sigma: total noise (B,), which sedd needs.
            pattern: who sees whom.
            kv_cache: the tokens before x.
            at: only these positions of the result, (n_selected, V), with subs masked ones: a
                boolean (B, T), or rows and columns (n_selected,), which nobody has to count, in the
                order that a boolean has.
        """
        is_index = isinstance(at, tuple)
        logits_at = at[0] * x.shape[1] + at[1] if is_index else at
        logits = self.logits(x, sigma, pattern=pattern, kv_cache=kv_cache, logits_at=logits_at)
        is_score = self.parameterization == "sedd"
        if self.parameterization == "ar" or (at is not None and not is_score):
            return token_log_probs(logits, mask_index=self.mask_index)
        num_columns = logits.shape[1] if at is None else x.shape[1] if is_index else at.shape[1]
        at = slice(None) if at is None else at
        x_t = x[:, :num_columns][at]
        if not is_score:
            return subs_log_probs(logits, x_t=x_t, mask_index=self.mask_index)
        sigma = sigma[:, None].expand(x.shape)[:, :num_columns][at]
        return sedd_log_score(logits, x_t=x_t, sigma=sigma)
