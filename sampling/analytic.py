"""The analytic (tweedie) sampler of SEDD, absorbing process (arXiv 2310.16834, section 4)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.denoiser import Denoiser
from models.masks import AttentionPattern
from noise_schedule import Noise

from .base import Generators, Progress, SamplerOutput, uniform
from .decoding import Decoding
from .stopping import StopRule

T_END = 1e-5  # the grid stops here, and one last step removes what noise is left


@dataclass(frozen=True, kw_only=True)
class AnalyticSampler:
    """Steps from t = 1 to `T_END`, then a last denoising step without the mask token.

    Args:
        noise: the schedule, for its total noise sigma(t).
        num_steps: T.
        mask_index: id of the mask token.
        pad_index: what stands behind the end of a row that stopped.
        decoding: how tokens are drawn.
        stop: when a row ends; looked at when all tokens are there.
    """

    noise: Noise
    num_steps: int
    mask_index: int
    pad_index: int
    decoding: Decoding = field(default_factory=Decoding)
    stop: StopRule = field(default_factory=StopRule)

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
        """See `Sampler.sample`. Each step is a pass, whether or not it reveals a token."""
        progress = Progress(
            canvas, mask_index=self.mask_index, limits=limits, on_step=on_step
        )
        times = torch.linspace(1, T_END, self.num_steps + 1, device=canvas.device)
        sigmas = self.noise.total_noise(times)
        drops = torch.cat((sigmas[:-1] - sigmas[1:], sigmas[-1:]))
        for step in range(self.num_steps + 1):
            x = progress.x
            log_p = self._reverse(denoise, x, sigma=sigmas[step], drop=drops[step])
            if step == self.num_steps:
                log_p[..., self.mask_index] = -torch.inf
            u = uniform(tuple(x.shape), device=x.device, generator=generator)
            tokens, confidence = self.decoding.draw(log_p.flatten(0, 1), u=u.flatten())
            tokens, confidence = tokens.view_as(x), confidence.view_as(x)
            at = progress.to_fill(0, x.shape[1]) & (tokens != self.mask_index)
            progress.reveal(
                at, tokens=tokens[at], confidence=confidence[at], took_part=progress.is_active
            )
        self.stop.apply(progress, end=canvas.shape[1])
        return progress.output(pad_index=self.pad_index)

    def _reverse(self, denoise: Denoiser, x: Tensor, *, sigma: Tensor, drop: Tensor) -> Tensor:
        """log p(x_s | x_t) up to a constant, (B, N, V), when the total noise drops by `drop`.

        The product of the staggered score e^(-drop Q) s and the transition x_s -> x_t, which for
        the absorbing process reaches a mask from every token and any other token from itself.
        """
        row_sigma = sigma.expand(len(x))
        score = denoise(x, row_sigma, pattern=AttentionPattern.FULL).double().exp()
        drop = drop.double()
        absorbed = (1 - drop.exp()) * score.sum(dim=-1)
        score = score * drop.exp()
        score[..., self.mask_index] += absorbed
        stay = (-drop).exp() * F.one_hot(x, score.shape[-1])
        is_mask = (x == self.mask_index)[..., None]
        return (score * (stay + is_mask * (1 - (-drop).exp()))).clamp(min=0).log()
