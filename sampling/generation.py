"""Texts from a model: what `Diffusion.generate` and the Hugging Face class's `generate` share."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.denoiser import Denoiser
from noise_schedule import Noise

from .base import SamplerOutput
from .options import SamplingOptions, make_sampler
from .rows import draw_rows


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A denoiser, and what its sampler needs to know of it.

    Args:
        denoiser: the network and its parameterization.
        sampler: ar, semi_ar or analytic (config key algo.sampler).
        block_size: L; for mdlm the context.
        is_block_causal: bd3lm rather than mdlm.
        mask_index, eos_index: ids; EOS also pads rows that stopped.
        noise: the schedule.
    """

    denoiser: Denoiser
    sampler: str
    block_size: int
    is_block_causal: bool
    mask_index: int
    eos_index: int
    noise: Noise

    def generate(
        self,
        canvas: Tensor,
        *,
        options: SamplingOptions,
        **how: Any,
    ) -> SamplerOutput:
        """Complete a canvas.

        Args:
            canvas: (B, N) int64.
            options: what to ask of the sampler.
            how: seed, limits and so on, see `draw_rows`.

        Raises:
            ValueError: the sampler cannot do what `options` ask for.
        """
        sampler = make_sampler(
            self.sampler,
            options,
            block_size=self.block_size,
            is_block_causal=self.is_block_causal,
            mask_index=self.mask_index,
            eos_index=self.eos_index,
            noise=self.noise,
        )
        return draw_rows(sampler, self.denoiser, canvas, **how)
