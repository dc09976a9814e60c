"""The analytic (tweedie) sampler of SEDD, absorbing process (arXiv 2310.16834, section 4)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.masks import AttentionPattern
from noise_schedule import Noise

from .base import Generators, Progress, SamplerOutput, uniform
from .decoding import MAX_NUMBERS, Decoding
from .stopping import StopRule

T_END = 1e-5  # the grid stops here, and one last step removes what noise is left
MAX_POSITIONS = 4096  # of one pass of the network; all scores of a large batch are too many


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
            is_open = progress.to_fill(0, canvas.shape[1])
            u = uniform(tuple(canvas.shape), device=canvas.device, generator=generator)
            tokens, confidence = self._draw(
                denoise, progress.x, is_open, u=u, sigma=sigmas[step], drop=drops[step],
                is_last=step == self.num_steps,
            )  # fmt: skip
            rows, columns = is_open.nonzero(as_tuple=True)
            new = (tokens != self.mask_index).nonzero()[:, 0]
            progress.reveal(
                (rows[new], columns[new]),
                tokens=tokens[new],
                confidence=confidence[new],
                took_part=progress.is_active,
            )
        self.stop.apply(progress, end=canvas.shape[1])
        return progress.output(pad_index=self.pad_index)

    def _draw(
        self,
        denoise: Denoiser,
        x: Tensor,
        is_open: Tensor,
        *,
        u: Tensor,
        sigma: Tensor,
        drop: Tensor,
        is_last: bool,
    ) -> tuple[Tensor, Tensor]:
        """One step of the masks at a boolean (B, N), row after row: tokens, maybe the mask again.

        A token that is no mask stays. Only so many positions at a time have scores, and only so
        many scores are float64: of a batch they would be tens of gigabytes.

        Returns:
            Tokens (n,) and the probability that each was drawn with, (n,).
        """
        tokens, confidence = [x.new_empty(0)], [u.new_empty(0)]
        num_rows = max(1, MAX_POSITIONS // x.shape[1])
        for rows, asked, numbers in zip(*(t.split(num_rows) for t in (x, is_open, u)), strict=True):
            at = asked.nonzero(as_tuple=True)
            row_sigma = sigma.expand(len(rows))
            log_score = denoise(rows, row_sigma, pattern=AttentionPattern.FULL, at=at)  # (n, V)
            size = max(1, MAX_NUMBERS // log_score.shape[-1])
            for some, u_some in zip(log_score.split(size), numbers[at].split(size), strict=True):
                if not len(some):  # a pass it is all the same
                    continue
                log_p = self._reverse(some, drop=drop)
                if is_last:
                    log_p[:, self.mask_index] = -torch.inf
                drawn = self.decoding.draw(log_p, u=u_some)
                tokens.append(drawn[0])
                confidence.append(drawn[1])
        return torch.cat(tokens), torch.cat(confidence)

    def _reverse(self, log_score: Tensor, *, drop: Tensor) -> Tensor:
        """log p(x_s | x_t) of masks up to a constant, (n, V), when the total noise drops by `drop`.

        The product of the staggered score e^(-drop Q) s and the transition x_s -> x_t, by which the
        absorbing process reaches a mask from every token.
        """
        score, drop = log_score.double().exp_(), drop.double()
        absorbed = (1 - drop.exp()) * score.sum(dim=-1)
        score *= drop.exp()
        score[:, self.mask_index] += absorbed
        to_mask = 1 - (-drop).exp()
        stays = (-drop).exp() + to_mask  # a mask is one
        mask_score = score[:, self.mask_index] * stays
        score *= to_mask
        score[:, self.mask_index] = mask_score
        return score.clamp_(min=0).log_()
