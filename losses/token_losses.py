"""Fresh noise for clean rows, and the loss of each token under it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from losses.capacity import most_masks, shapes_are_fixed
from losses.forward_process import (
    FULL,
    ClipInterval,
    noise_values,
    q_xt,
    q_xt_within,
    sample_t,
    spread_over_draws,
)
from losses.objectives import ar_token_losses, diffusion_token_losses
from models.denoiser import Denoiser
from models.kv_cache import CleanHalf
from models.masks import AttentionPattern
from noise_schedule import Noise, NoiseValues

# Ranges of t that share a forward pass: enough rows to keep a GPU busy, and without gradients still
# less memory than a training step.
RANGES_AT_ONCE = 4


class Noisy(NamedTuple):
    """A noisy form of clean rows.

    Attributes:
        x_t: (B, N).
        values: per token, (B, N) or, where t is one for a row, (B, 1).
        interval: the range of t.
    """

    x_t: Tensor
    values: NoiseValues
    interval: ClipInterval


@dataclass(frozen=True, kw_only=True, eq=False)  # dynamo of torch 2.11 hashes it unfinished
class TokenLosses:
    """The terms of the NELBO (paper eq. 8), of ar of the exact NLL, for one draw of noise.

    Args:
        denoiser: the network and its parameterization.
        noise: the schedule.
        pattern: who sees whom in training; ar is causal in any case.
        block_size: L.
        antithetic: spread the times evenly, see `forward_process.sample_t`.
        resample: keep the masked fraction of each block in the range of t.
        mdlm_loss_scale: weigh as earlier papers do, see `forward_process.noise_values`.
        ignore_bos: position 0 stays clean.
        min_rows: the rows that the network is given at least where there are no gradients. Compiled
            for each number of rows, it would be compiled once more for the last, smaller batch.
    """

    denoiser: Denoiser
    noise: Noise
    pattern: AttentionPattern
    block_size: int
    antithetic: bool = True
    resample: bool = False
    mdlm_loss_scale: bool = False
    ignore_bos: bool = True
    min_rows: int = 0

    def __call__(
        self,
        x_0: Tensor,
        *,
        interval: ClipInterval = FULL,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Losses per token, t drawn from the interval.

        Args:
            x_0: clean tokens (B, N).
            interval: the range of t.
            generator: on the device of x_0; None: torch's own stream.

        Returns:
            (B, N), for ar (B, N - 1): the first token has no prediction.
        """
        if self.denoiser.parameterization == "ar":
            return ar_token_losses(self.denoiser, self.padded(x_0))[: len(x_0)]
        noisy = self._add_noise(x_0, interval=interval, generator=generator)
        return self._losses(x_0, [noisy])[0]

    def on_all(
        self, x_0: Tensor, intervals: Sequence[ClipInterval]
    ) -> dict[ClipInterval, Tensor]:
        """Losses per token (B, N) on each range, without gradients.

        With block diffusion x_0, which no noise touches, is seen once for all of them.
        """
        if self.denoiser.parameterization == "ar":  # which knows no noise
            return {interval: self(x_0) for interval in intervals}
        noisy = (self._add_noise(x_0, interval=interval) for interval in intervals)
        return dict(zip(intervals, self._of_each(x_0, noisy, num=len(intervals)), strict=True))

    def draws(
        self,
        x_0: Tensor,
        *,
        num_draws: int,
        given: Tensor | None = None,
        interval: ClipInterval = FULL,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Losses per token (B, N) of each of D draws of noise, without gradients.

        The times of a block are spread over its draws too, see `spread_over_draws`.

        Args:
            x_0: clean tokens (B, N); where they are masks, these stay masks.
            num_draws: D.
            given: tokens that stay clean, (B, N) bool; None: position 0, with `ignore_bos`.
            interval, generator: as in a call.
        """
        shared = {"interval": interval, "generator": generator}
        times = [None] * num_draws
        if self.antithetic and num_draws > 1:
            t = self._sample_t(x_0, **shared)
            times = spread_over_draws(t, num_draws=num_draws, interval=interval)
        noisy = (self._add_noise(x_0, t=t, given=given, **shared) for t in times)
        yield from self._of_each(x_0, noisy, num=num_draws, counts_masks=given is not None)

    def _of_each(
        self, x_0: Tensor, noisy: Iterable[Noisy], *, num: int, counts_masks: bool = False
    ) -> Iterator[Tensor]:
        """Losses (B, N) under each of `num` noisy forms of the same rows, some in one pass."""
        sees_x_0 = self.pattern_of(x_0) is AttentionPattern.BLOCK_DIFFUSION
        if not sees_x_0 or num == 1:
            for one in noisy:
                yield from self._losses(x_0, [one], counts_masks=counts_masks)
            return
        clean, noisy = self.denoiser.clean_half(self.padded(x_0)), iter(noisy)
        while together := list(itertools.islice(noisy, RANGES_AT_ONCE)):
            yield from self._losses(x_0, together, clean=clean, counts_masks=counts_masks)

    def _losses(
        self,
        x_0: Tensor,
        noisy: Sequence[Noisy],
        *,
        clean: CleanHalf | None = None,
        counts_masks: bool = False,
    ) -> Sequence[Tensor]:
        """Losses (B, N) under each x_t with its values, all of them in one pass.

        Args:
            counts_masks: wait for the device to count them: there are others than noise made.
        """
        rows = self.padded(x_0)
        added = rows[len(x_0) :]  # in which nothing is masked
        capacity = None
        if shapes_are_fixed(x_0.device) and not counts_masks:
            capacity = sum(self._capacity(tuple(rows.shape), one.interval) for one in noisy)
        found = diffusion_token_losses(
            self.denoiser,
            rows.repeat(len(noisy), 1),
            x_t=torch.cat([part for one in noisy for part in (one.x_t, added)]),
            values=NoiseValues.cat([self._padded_values(one.values) for one in noisy]),
            sigma_max=self.noise.sigma_max,
            pattern=self.pattern_of(x_0),
            clean=clean,
            capacity=capacity,
        )
        return [losses[: len(x_0)] for losses in found.chunk(len(noisy))]

    def _capacity(self, rows: tuple[int, int], interval: ClipInterval) -> int:
        """Room for the masks of (B, N) tokens."""
        return most_masks(
            self.noise,
            interval,
            rows=rows,
            block_size=self.block_size,
            antithetic=self.antithetic,
            resample=self.resample,
            mdlm_loss_scale=self.mdlm_loss_scale,
        )

    def padded(self, x: Tensor) -> Tensor:
        """Rows (B, ...), and copies of the last one where there are fewer than `min_rows`."""
        missing = 0 if torch.is_grad_enabled() else self.min_rows - len(x)
        return torch.cat((x, x[-1:].expand(missing, -1))) if missing > 0 else x

    def _padded_values(self, values: NoiseValues) -> NoiseValues:
        return NoiseValues(*(self.padded(value) for value in vars(values).values()))

    def pattern_of(self, x_0: Tensor) -> AttentionPattern:
        """Who sees whom in rows (B, N).

        One that is a single block (L = N) sees nothing of x_0, which is left out of the pass.
        """
        is_one_block = x_0.shape[1] == self.block_size
        return AttentionPattern.FULL if is_one_block else self.pattern

    def _sample_t(
        self, x_0: Tensor, *, interval: ClipInterval, generator: torch.Generator | None
    ) -> Tensor:
        """A time for each block, (B, K)."""
        return sample_t(
            (x_0.shape[0], x_0.shape[1] // self.block_size),
            interval=interval,
            antithetic=self.antithetic,
            device=x_0.device,
            generator=generator,
        )

    def _add_noise(
        self,
        x_0: Tensor,
        *,
        interval: ClipInterval,
        t: Tensor | None = None,
        given: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Noisy:
        """x_t of these times (B, K) or of fresh ones; `given` as in `draws`."""
        if t is None:
            t = self._sample_t(x_0, interval=interval, generator=generator)
        values = noise_values(
            self.noise, t, interval=interval, mdlm_loss_scale=self.mdlm_loss_scale
        )  # each (B, K)
        x_t = self._sample_x_t(
            x_0, move_chance=values.move_chance, interval=interval, generator=generator
        )
        if given is not None:
            x_t = torch.where(given, x_0, x_t)
        repeats = self.block_size if t.shape[1] > 1 else 1
        return Noisy(x_t, values.repeat_interleave(repeats), interval)

    def _sample_x_t(
        self,
        x_0: Tensor,
        *,
        move_chance: Tensor,
        interval: ClipInterval,
        generator: torch.Generator | None,
    ) -> Tensor:
        """x_t for p per block (B, K)."""
        shared = {"mask_index": self.denoiser.mask_index, "ignore_bos": self.ignore_bos}
        if self.resample and interval != FULL:
            return q_xt_within(
                x_0,
                move_chance=move_chance,
                interval=interval,
                block_size=self.block_size,
                generator=generator,
                **shared,
            )
        u = torch.rand(x_0.shape, device=x_0.device, generator=generator)
        move_chance = move_chance.repeat_interleave(self.block_size, dim=1)
        return q_xt(x_0, u=u, move_chance=move_chance, **shared)
