"""Filling gaps in view of all that stands to their right.

A block-causal network shows a gap nothing behind its own block. But its samplers have a joint
distribution of texts, p(x), and with it a conditional one, p(x at the gaps | the given tokens).
Importance resampling (sequential Monte Carlo) draws from it in the limit of many particles:

Behind the first gap given tokens are revealed as if they were sampled: in the sampler's own order,
independent of the tokens, and from the network's prediction. Where a token is to be sampled, it is
drawn. Where it is given, it is written, and the particle's weight is multiplied by its probability
there. At the end of a block particles are drawn again in proportion to their weights where few of
them carry most of the weight; at the end one of them is the row's text.

The estimate of p(given tokens) that the mean weight is, is unbiased for any number of particles; so
each text is drawn with its conditional probability up to an error of order 1 / particles.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.kv_cache import KVCache

from .base import Generators, Progress, SamplerOutput, uniform
from .blockwise import BlockwiseSampler
from .decoding import categorical
from .reveal import passes_of


class Particles(Progress):
    """K texts in the making for each row of a canvas; the K of a row stand together.

    Args:
        canvas: (B, N), given tokens and masks.
        num_particles: K.
        mask_index, limits, on_step: as in `Progress`; `on_step` sees the first text of each row.

    Attributes:
        wanted: the given tokens that are not yet in the text, elsewhere the mask, (B K, N).
        log_weight: unnormalised, (B, K) float64.
    """

    def __init__(
        self,
        canvas: Tensor,
        *,
        num_particles: int,
        mask_index: int,
        limits: Tensor | None,
        on_step: Callable[[Tensor], None] | None,
    ):
        # Given tokens before the first gap are a prompt: nothing before them is uncertain.
        is_prompt = (canvas != mask_index).cumprod(dim=1).bool()
        super().__init__(
            canvas.where(is_prompt, mask_index).repeat_interleave(num_particles, dim=0),
            mask_index=mask_index,
            limits=None if limits is None else limits.repeat_interleave(num_particles),
            on_step=None if on_step is None else lambda x: on_step(x[::num_particles]),
        )
        self.wanted = canvas.where(~is_prompt, mask_index).repeat_interleave(num_particles, dim=0)
        shape = (len(canvas), num_particles)
        self.log_weight = torch.zeros(shape, dtype=torch.float64, device=canvas.device)

    @property
    def weights(self) -> Tensor:
        """Normalised in each row, (B, K)."""
        return self.log_weight.softmax(dim=1)

    def weigh(self, rows: Tensor, *, log_p: Tensor) -> None:
        """Multiply the weights of particles (n,), some several times, by probabilities (n,)."""
        self.log_weight.view(-1).index_add_(0, rows, log_p)

    def resample(self, *, u: Tensor) -> Tensor | None:
        """Draw the particles of rows anew in which few carry most of the weight.

        Systematic resampling, where the effective number 1 / sum of squared weights is under K / 2.

        Args:
            u: uniform numbers (B,).

        Returns:
            Which particle each one now is, (B K,); None where all stay.
        """
        weights, (num_rows, num) = self.weights, self.log_weight.shape
        is_poor = 1 / weights.square().sum(dim=1) < num / 2
        if not is_poor.any():
            return None
        own = torch.arange(num, device=u.device)
        grid = (own + u[:, None]) / num  # (B, K)
        chosen = torch.searchsorted(weights.cumsum(dim=1), grid, right=True).clamp(max=num - 1)
        chosen = torch.where(is_poor[:, None], chosen, own)
        self.log_weight = self.log_weight.masked_fill(is_poor[:, None], 0.0)
        index = (chosen + num * torch.arange(num_rows, device=u.device)[:, None]).flatten()
        self.x = self.x[index]
        self._revealed_at, self._confidence = self._revealed_at[index], self._confidence[index]
        return index

    def pick(self, *, u: Tensor) -> Tensor:
        """The number of one particle per row, in proportion to the weights, for u (B,); (B,)."""
        num_rows, num = self.log_weight.shape
        return categorical(self.weights, u=u) + num * torch.arange(num_rows, device=u.device)


@dataclass(frozen=True, kw_only=True)
class ParticleSampler:
    """Draws from another sampler's distribution given all given tokens, also those further right.

    Stop rules look at the finished text, with the result that they have when it grows.

    Args:
        inner: the sampler; without a threshold, since then the order depends on the tokens.
        num_particles: K; memory and work are those of K rows for each row.
    """

    inner: BlockwiseSampler
    num_particles: int

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
        """See `Sampler.sample`. The passes of all K particles of a row count."""
        inner, length = self.inner, canvas.shape[1]
        particles = Particles(
            canvas,
            num_particles=self.num_particles,
            mask_index=inner.mask_index,
            limits=limits,
            on_step=on_step,
        )
        cache = inner.make_cache(denoise, len(particles.x), length=length)
        u_pick = uniform((len(canvas), 1), device=canvas.device, generator=generator)
        ends = [0]
        while ends[-1] < length and particles.is_active.any():
            start, end = ends[-1], inner.end_of_block(ends[-1], length=length)
            u = uniform(
                (len(canvas), 1 + 2 * self.num_particles * (end - start)),
                device=canvas.device,
                generator=generator,
            )
            numbers = u[:, 1:].reshape(len(particles.x), -1)  # (B K, 2 L)
            self._fill(denoise, particles, cache, start=start, end=end, u=numbers)
            index = particles.resample(u=u[:, 0])
            if index is not None and cache is not None:
                cache.select_rows(index)
            particles.stop_at_limits(end)
            ends.append(end)
        picked = particles.pick(u=u_pick[:, 0])
        return self._finish(particles, picked, canvas=canvas, limits=limits, ends=ends[1:])

    def _fill(
        self,
        denoise: Denoiser,
        particles: Particles,
        cache: KVCache | None,
        *,
        start: int,
        end: int,
        u: Tensor,
    ) -> None:
        """Reveal the masks of one block: draw tokens, or write given ones and weigh them."""
        inner, wanted = self.inner, particles.wanted[:, start:end]
        u_order, u_token = u.split(end - start, dim=1)
        for at in passes_of(inner.pass_numbers(particles.to_fill(start, end), u=u_order)):
            if not len(at[0]):
                continue
            log_p = inner.predict(denoise, particles, cache, start=start, end=end, at=at)
            tokens, confidence = inner.decoding.draw(log_p, u=u_token[at])
            given = (wanted[at] != inner.mask_index).nonzero()[:, 0]
            tokens[given] = wanted[at][given]
            log_likelihood = self._log_likelihood(log_p[given], tokens=tokens[given])
            confidence[given] = log_likelihood.exp()
            particles.weigh(at[0][given], log_p=log_likelihood)
            particles.reveal(at, tokens=tokens, confidence=confidence, start=start)

    def _log_likelihood(self, log_p: Tensor, *, tokens: Tensor) -> Tensor:
        """log p of given tokens (n,) under predictions (n, V), float64.

        The temperature counts, 0 excepted. A nucleus does not: what is given may lie outside.
        """
        log_p = (log_p.double() / (self.inner.decoding.temperature or 1.0)).log_softmax(dim=-1)
        return log_p.gather(-1, tokens[:, None]).squeeze(-1)

    def _finish(
        self,
        particles: Particles,
        picked: Tensor,
        *,
        canvas: Tensor,
        limits: Tensor | None,
        ends: list[int],
    ) -> SamplerOutput:
        """The picked particles (B,) as the rows of the canvas, stopped as the rules say."""
        inner = self.inner
        drawn = particles.output(pad_index=inner.pad_index)
        rows = Progress(canvas, mask_index=inner.mask_index, limits=limits)
        rows.x = particles.x[picked]
        for end in ends:
            inner.stop.apply(rows, end=end)
        is_given = canvas != inner.mask_index
        return replace(
            rows.output(pad_index=inner.pad_index),
            num_forward_passes=drawn.num_forward_passes[picked] * self.num_particles,
            num_denoising_passes=drawn.num_denoising_passes[picked] * self.num_particles,
            revealed_at=drawn.revealed_at[picked].masked_fill(is_given, 0),
            confidence=drawn.confidence[picked].masked_fill(is_given, 1.0),
        )
