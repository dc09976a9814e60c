"""The analytic (tweedie) sampler of SEDD, absorbing process (arXiv 2310.16834, section 4)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.masks import AttentionPattern
from noise_schedule import Noise
from objectives import Denoiser

from .base import SamplerOutput
from .decoding import categorical, nucleus

T_END = 1e-5  # the grid stops here, and one last step removes what noise is left


@dataclass(frozen=True, kw_only=True)
class AnalyticSampler:
    """Steps from t = 1 to `T_END`, then a last denoising step without the mask token.

    Args:
        noise: the schedule, for its total noise sigma(t).
        num_steps: T.
        bos_index: id of BOS at position 0, which training kept clean; None leaves it free.
        mask_index: id of the mask token.
        nucleus_p: as in `decoding.nucleus`.
    """

    noise: Noise
    num_steps: int
    bos_index: int | None
    mask_index: int
    nucleus_p: float = 1.0

    def sample(
        self,
        denoise: Denoiser,
        *,
        batch_size: int,
        length: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> SamplerOutput:
        """See `Sampler.sample`."""
        x = torch.full((batch_size, length), self.mask_index, device=device)
        if self.bos_index is not None:
            x[:, 0] = self.bos_index
        times = torch.linspace(1, T_END, self.num_steps + 1, device=device)
        sigmas = self.noise.total_noise(times)
        for step in range(self.num_steps):
            drop = sigmas[step] - sigmas[step + 1]
            probs = self._reverse(denoise, x, sigma=sigmas[step], drop=drop)
            x = self._draw(probs, x=x, generator=generator)
        probs = self._reverse(denoise, x, sigma=sigmas[-1], drop=sigmas[-1])
        probs[..., self.mask_index] = 0.0
        x = self._draw(probs, x=x, generator=generator)
        nfe = torch.full((batch_size,), self.num_steps + 1, device=device)
        return SamplerOutput(tokens=x, num_forward_passes=nfe)

    def _reverse(self, denoise: Denoiser, x: Tensor, *, sigma: Tensor, drop: Tensor) -> Tensor:
        """p(x_s | x_t), unnormalised (B, N, V), when the total noise drops from sigma by `drop`.

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
        return (score * (stay + is_mask * (1 - (-drop).exp()))).clamp(min=0)

    def _draw(self, probs: Tensor, *, x: Tensor, generator: torch.Generator | None) -> Tensor:
        probs = nucleus(probs / probs.sum(dim=-1, keepdim=True), p=self.nucleus_p)
        drawn = categorical(probs, generator=generator)
        return torch.where(x == self.mask_index, drawn, x)
