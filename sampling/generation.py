"""Texts from a model: what `Diffusion.generate` and the Hugging Face class's `generate` share."""

from collections.abc import Callable
from dataclasses import dataclass

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
        seed: int,
        limits: Tensor | None = None,
        first_row: int = 0,
        max_retries: int = 10,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> SamplerOutput:
        """Complete a canvas (B, N); arguments as in `draw_rows`.

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
        return draw_rows(
            sampler,
            self.denoiser,
            canvas,
            seed=seed,
            limits=limits,
            first_row=first_row,
            max_retries=max_retries,
            on_step=on_step,
        )
