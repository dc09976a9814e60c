"""Autoregressive sampling, token by token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.kv_cache import KVCache
from models.masks import AttentionPattern

from .base import Generators, Positions, Progress, SamplerOutput, uniform
from .blockwise import CONTEXT_WINDOW, BlockwiseSampler
from .reveal import NOT_MASKED, passes_of

STOP_EVERY = 16  # tokens between two looks at the stop rule


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(BlockwiseSampler):
    """Draws each token given the ones before it; arguments as in `BlockwiseSampler`."""

    pattern: AttentionPattern = AttentionPattern.CAUSAL

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
        progress, cache = self.begin(denoise, canvas, limits=limits, on_step=on_step)
        u = uniform((len(canvas), length), device=canvas.device, generator=generator)
        start = 1
        while start < length and progress.is_active.any():
            end = min(length, (start // STOP_EVERY + 1) * STOP_EVERY)
            masked = progress.to_fill(start, end)
            number = torch.arange(end - start, device=u.device).where(masked, NOT_MASKED)
            for position, (rows, columns) in enumerate(passes_of(number), start=start):
                if len(rows):
                    at = rows, torch.zeros_like(columns)
                    log_p = self.predict(
                        denoise, progress, cache, start=position, end=position + 1, at=at
                    )
                    tokens, confidence = self.decoding.draw(log_p, u=u[rows, position])
                    progress.reveal(at, tokens=tokens, confidence=confidence, start=position)
            self.stop.apply(progress, end=end)
            start = end
        return progress.output(pad_index=self.pad_index)

    def cache_capacity(self, length: int) -> int:
        """Tokens the cache holds."""
        return min(CONTEXT_WINDOW, length)

    def end_of_block(self, start: int, *, length: int) -> int:
        """A token is a block of its own."""
        return start + 1

    def pass_numbers(self, masked: Tensor, *, u: Tensor) -> Tensor:
        """In which pass of its block each mask is drawn, (B, 1): the only one."""
        return torch.zeros_like(masked, dtype=torch.int64).masked_fill(~masked, NOT_MASKED)

    def predict(
        self,
        denoise: Denoiser,
        progress: Progress,
        cache: KVCache | None,
        *,
        start: int,
        end: int,
        at: Positions,
    ) -> Tensor:
        """log p of the token at `start` = `end` - 1 in these rows, (n, V)."""
        first = max(0, start - CONTEXT_WINDOW)
        if cache is not None:
            while start > cache.capacity and cache.num_tokens < start - 1:
                # Given tokens beyond the window, where passes cannot carry several.
                self.store(denoise, progress, cache, num_tokens=1)
            first = cache.num_tokens
        window = progress.x[:, first:start]
        at = at[0], at[1] + (window.shape[1] - 1)
        log_p = denoise(window, pattern=self.pattern, kv_cache=cache, at=at)
        if cache is not None:
            cache.commit(window.shape[1])
        return log_p
