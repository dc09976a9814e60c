"""Semi-autoregressive sampling of masked diffusion models, block after block (paper section 3.2).

For bd3lm a block is the model's own; attention is block-causal, so finished blocks can be kept as
keys and values. For mdlm the block is the whole context, and longer texts are made in windows that
overlap by half.

Beyond the context window the network sees the last `CONTEXT_WINDOW` tokens. Without a cache it
recomputes that window, which has forgotten what came before. With a cache the window's keys and
values are those of the time when they were stored: each still carries what its token saw then.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.kv_cache import KVCache
from models.masks import AttentionPattern

from .base import Generators, Positions, Progress, SamplerOutput, uniform
from .blockwise import CONTEXT_WINDOW, BlockwiseSampler
from .reveal import confident, on_time_grid, one_by_one, passes_of


@dataclass(frozen=True, kw_only=True)
class SemiAutoregressiveSampler(BlockwiseSampler):
    """Fills one block of masks after another.

    Args:
        mask_index, pad_index, decoding, stop, use_cache: see `BlockwiseSampler`.
        pattern: `BLOCK_CAUSAL` (bd3lm, which alone may use a cache) or `FULL` (mdlm).
        block_size: tokens per block.
        num_steps: None for first-hitting; otherwise T, ancestral steps per block.
        tokens_per_step: with first-hitting, masks revealed together; 1 is exact.
        confidence_threshold: reveal whatever is at least this probable instead; None does not.
    """

    block_size: int
    num_steps: int | None = None
    tokens_per_step: int = 1
    confidence_threshold: float | None = None

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
        """See `Sampler.sample`."""
        length = canvas.shape[1]
        progress, cache = self.begin(denoise, canvas, limits=limits, on_step=on_step)
        start = 0
        while start < length and progress.is_active.any():
            end = self.end_of_block(start, length=length)
            self.fill(denoise, progress, cache, start=start, end=end, generator=generator)
            self.stop.apply(progress, end=end)
            start = end
        return progress.output(pad_index=self.pad_index)

    def cache_capacity(self, length: int) -> int:
        """Tokens the cache holds: whole blocks up to the context window."""
        blocks = max(1, CONTEXT_WINDOW // self.block_size)
        return min(blocks, -(-length // self.block_size)) * self.block_size

    def end_of_block(self, start: int, *, length: int) -> int:
        """Where the block that begins at `start` ends; mdlm goes on by half a window."""
        is_later_window = self.pattern is AttentionPattern.FULL and start > 0
        step = max(1, self.block_size // 2) if is_later_window else self.block_size
        return min(start + step, length)

    def _window_start(self, end: int) -> int:
        """The first token the network sees when it fills the block that ends at `end`."""
        limit = self.block_size if self.pattern is AttentionPattern.FULL else CONTEXT_WINDOW
        return max(0, end - max(limit, self.block_size))

    def fill(
        self,
        denoise: Denoiser,
        progress: Progress,
        cache: KVCache | None,
        *,
        start: int,
        end: int,
        generator: Generators,
    ) -> None:
        """Reveal the masks of one block, in all active rows."""
        masked = progress.to_fill(start, end)
        size = end - start
        u = uniform((len(masked), 2 * size), device=masked.device, generator=generator)
        u_order, u_token = u.split(size, dim=1)

        def predict(at: Positions) -> Tensor:
            return self.predict(denoise, progress, cache, start=start, end=end, at=at)

        if self.confidence_threshold is not None:
            self._fill_by_confidence(predict, progress, masked, u_token=u_token, start=start)
            return
        passes = [at for at in passes_of(self.pass_numbers(masked, u=u_order)) if len(at[0])]

        def run(is_wrong: Tensor | None) -> None:
            for at in passes:
                drawn = self.decoding.draw(predict(at), u=u_token[at], is_wrong=is_wrong)
                progress.reveal(at, tokens=drawn[0], confidence=drawn[1], start=start)

        if not (self.decoding.may_guess(masked.device) and progress.guesses.next()):
            run(None)
            return
        take_back, is_wrong = progress.saved(), torch.zeros_like(progress.is_active[0])
        run(is_wrong)
        if progress.guesses.was_wrong(is_wrong):
            take_back()
            run(None)

    def pass_numbers(self, masked: Tensor, *, u: Tensor) -> Tensor:
        """In which pass each mask of a block is revealed, (B, L); see `reveal.one_by_one`."""
        if self.num_steps is None:
            return one_by_one(masked, u=u, tokens_per_step=self.tokens_per_step)
        return on_time_grid(masked, u=u, num_steps=self.num_steps)

    def _fill_by_confidence(
        self,
        predict: Callable[[Positions], Tensor],
        progress: Progress,
        masked: Tensor,
        *,
        u_token: Tensor,
        start: int,
    ) -> None:
        """Reveal in each pass what is probable enough, at least one mask per row."""
        while len((asked := masked.nonzero(as_tuple=True))[0]):
            log_p = predict(asked)  # (n, V)
            best = torch.zeros(masked.shape, dtype=torch.float64, device=masked.device)
            best[asked] = log_p.amax(dim=-1).double().exp()
            is_sure = confident(masked, confidence=best, threshold=self.confidence_threshold)
            chosen = is_sure[asked].nonzero()[:, 0]
            at = asked[0][chosen], asked[1][chosen]
            tokens, confidence = self.decoding.draw(log_p[chosen], u=u_token[at])
            progress.reveal(at, tokens=tokens, confidence=confidence, start=start)
            masked = masked & ~is_sure

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
        """See `BlockwiseSampler.predict`."""
        first = self._window_start(end)
        if cache is not None:
            first = self._store_what_does_not_fit(denoise, progress, cache, start=start, end=end)
        window = progress.x[:, first:end]
        at = at[0], at[1] + (start - first)
        log_p = denoise(window, pattern=self.pattern, kv_cache=cache, at=at)
        if cache is not None and start > first:
            # The finished blocks went through the network together with this one's first step.
            cache.commit(start - first)
        return log_p

    def _store_what_does_not_fit(
        self, denoise: Denoiser, progress: Progress, cache: KVCache, *, start: int, end: int
    ) -> int:
        """Store finished blocks that cannot share a pass with this one; the first unstored token.

        A pass may carry them along as long as nothing has to leave the cache for it.
        """
        while cache.num_tokens < start and end > cache.capacity:
            self.store(denoise, progress, cache, num_tokens=self.block_size)
        return cache.num_tokens
