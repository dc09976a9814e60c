"""Rows that do not depend on their batch: each has its own stream of random numbers."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from models.denoiser import Denoiser
from utils import SAMPLE_STREAM, derive_seed

from .base import Sampler, SamplerOutput


def draw_rows(
    sampler: Sampler,
    denoise: Denoiser,
    canvas: Tensor,
    *,
    seed: int,
    limits: Tensor | None = None,
    first_row: int = 0,
    max_retries: int = 10,
    on_step: Callable[[Tensor], None] | None = None,
) -> SamplerOutput:
    """Complete a canvas; rows that degenerate are drawn again, without the others.

    A row's stream depends on `seed` and the row's number alone: the same rows come out in batches
    of any size.

    Args:
        sampler, denoise, canvas, limits, on_step: see `Sampler.sample`; the canvas is (B, N).
        seed: of all rows.
        first_row: number of the first row; a later batch goes on where the last one ended.
        max_retries: how often a row that degenerates is drawn again.

    Returns:
        The rows. One that degenerated in the last attempt too has `accepted` False.
    """

    denoise = denoise.for_sampling()

    def draw(rows: list[int], *, attempt: int) -> SamplerOutput:
        # Static passes are made for one batch size: what fills it up ends before it begins.
        num_spare = len(canvas) - len(rows) if denoise.has_static_passes else 0
        drawn = rows + rows[:1] * num_spare
        ends = None if limits is None else limits[drawn]
        if num_spare:
            ends = torch.full_like(canvas[drawn, 0], canvas.shape[1]) if ends is None else ends
            ends[len(rows) :] = 1
        show = on_step
        if num_spare and on_step is not None:
            show = lambda tokens: on_step(tokens[: len(rows)])  # noqa: E731
        seeds = [derive_seed(seed, SAMPLE_STREAM, first_row + row, attempt) for row in drawn]
        output = sampler.sample(
            denoise,
            canvas[drawn],
            limits=ends,
            generator=[torch.Generator(canvas.device).manual_seed(s) for s in seeds],
            on_step=show,
        )
        return output.first_rows(len(rows)) if num_spare else output

    output = draw(list(range(len(canvas))), attempt=0)
    for attempt in range(1, max_retries + 1):
        rejected = (~output.accepted).nonzero()[:, 0].tolist()
        if not rejected:
            break
        again = draw(rejected, attempt=attempt)
        spent = output.num_forward_passes[rejected] + again.num_forward_passes
        again = dataclasses.replace(again, num_forward_passes=spent)
        output = output.replace_rows(rejected, again)
    return output
