"""Autoregressive sampling, token by token."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.kv_cache import KVCache
from models.masks import AttentionPattern
from objectives import Denoiser

from .base import Generators, Progress, SamplerOutput, uniform
from .decoding import Decoding
from .semi_ar import CONTEXT_WINDOW
from .stopping import StopRule

STOP_EVERY = 16  # tokens between two looks at the stop rule


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler:
    """Draws each token given the ones before it.

    Args:
        mask_index: id of the mask token, which marks what is to be drawn.
        pad_index: what stands behind the end of a row that stopped.
        decoding: how tokens are drawn.
        stop: when a row ends.
        use_cache: keep keys and values of the text so far.
    """

    mask_index: int
    pad_index: int
    decoding: Decoding = field(default_factory=Decoding)
    stop: StopRule = field(default_factory=StopRule)
    use_cache: bool = False

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoiser,
        canvas: Tensor,
        *,
        limits: Tensor | None = None,
        generator: Generators = None,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> SamplerOutput:
        """See `Sampler.sample`. Given tokens behind a gap do not influence it."""
        length = canvas.shape[1]
        progress = Progress(
            canvas, mask_index=self.mask_index, limits=limits, on_step=on_step
        )
        u = uniform((len(canvas), length), device=canvas.device, generator=generator)
        cache = None
        if self.use_cache:
            cache = denoise.make_cache(len(canvas), capacity=min(CONTEXT_WINDOW, length))
        for position in range(1, length):
            at = progress.to_fill(position, position + 1)[:, 0]
            if at.any():
                log_p = self._predict(denoise, progress, cache, position=position)[at]
                tokens, confidence = self.decoding.draw(log_p, u=u[at, position])
                progress.reveal(
                    at[:, None], tokens=tokens, confidence=confidence, start=position
                )
            if (position + 1) % STOP_EVERY == 0 or position + 1 == length:
                self.stop.apply(progress, end=position + 1)
                if not progress.is_active.any():
                    break
        return progress.output(pad_index=self.pad_index)

    def _predict(
        self, denoise: Denoiser, progress: Progress, cache: KVCache | None, *, position: int
    ) -> Tensor:
        """log p of the token at `position`, (B, V)."""
        first = max(0, position - CONTEXT_WINDOW)
        if cache is not None:
            while position > cache.capacity and cache.num_tokens < position - 1:
                self._store_one(denoise, progress, cache)
            first = cache.num_tokens
        window = progress.x[:, first:position]
        at = torch.zeros_like(window, dtype=torch.bool)
        at[:, -1] = True
        log_p = denoise(window, pattern=AttentionPattern.CAUSAL, kv_cache=cache, at=at)
        if cache is not None:
            cache.commit(window.shape[1])
        return log_p

    def _store_one(self, denoise: Denoiser, progress: Progress, cache: KVCache) -> None:
        """Store one given token beyond the window, where passes cannot carry several."""
        token = progress.x[:, cache.num_tokens : cache.num_tokens + 1]
        nowhere = torch.zeros_like(token, dtype=torch.bool)
        denoise(token, pattern=AttentionPattern.CAUSAL, kv_cache=cache, at=nowhere)
        cache.commit(1)
        progress.count_storing_pass()
