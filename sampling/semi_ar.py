"""Semi-autoregressive sampling of masked diffusion models, block after block (paper section 3.2).

For bd3lm a block is the model's own; attention is block-causal. For mdlm the block is the whole
context, and longer texts are made in windows that overlap by half.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.masks import AttentionPattern
from objectives import Denoiser

from .base import SamplerOutput
from .decoding import categorical, nucleus

CONTEXT_WINDOW = 1024  # tokens that the network sees at most


@dataclass(frozen=True, kw_only=True)
class SemiAutoregressiveSampler:
    """Fills one block of masks after another.

    Args:
        block_size: tokens per block.
        bos_index, mask_index: ids; position 0 of a row is BOS.
        pattern: `BLOCK_CAUSAL` (bd3lm) or `FULL` (mdlm).
        nucleus_p: as in `decoding.nucleus`.
        num_steps: None for first-hitting, one token per forward pass; otherwise T, the steps of
            the ancestral sampler per block.
    """

    block_size: int
    bos_index: int
    mask_index: int
    pattern: AttentionPattern
    nucleus_p: float = 1.0
    num_steps: int | None = None

    def sample(
        self,
        denoise: Denoiser,
        *,
        batch_size: int,
        length: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> SamplerOutput:
        """See `Sampler.sample`; `length` is a multiple of the block size (mdlm: of half of it)."""
        nfe = torch.zeros(batch_size, dtype=torch.int64, device=device)
        text = torch.full((batch_size, 1), self.bos_index, device=device)
        fill = self._first_hitting if self.num_steps is None else self._ancestral
        while text.shape[1] < length:
            end = self._end_of_next_block(text.shape[1], length=length)
            masks = text.new_full((batch_size, end - text.shape[1]), self.mask_index)
            text = torch.cat((text, masks), dim=1)
            start = self._window_start(end)
            window = text[:, start:].clone()
            nfe += fill(denoise, window, generator=generator)
            text[:, start:] = window
        return SamplerOutput(tokens=text, num_forward_passes=nfe)

    def _end_of_next_block(self, position: int, *, length: int) -> int:
        """Where the block that `position` lies in ends; mdlm goes on by half a window."""
        if self.pattern is AttentionPattern.FULL and position >= self.block_size:
            return min(position + max(1, self.block_size // 2), length)
        return min((position // self.block_size + 1) * self.block_size, length)

    def _window_start(self, end: int) -> int:
        """The first token the network sees when it fills the block that ends at `end`."""
        limit = self.block_size if self.pattern is AttentionPattern.FULL else CONTEXT_WINDOW
        return max(0, end - max(limit, self.block_size))

    def _first_hitting(
        self, denoise: Denoiser, x: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        """Reveal one masked token per pass, in a uniformly random order (paper appendix B.1).

        The time of a step, t <- t u^(1/n), is bookkeeping that the network does not see. Rows
        have equally many masks. Fills `x` (B, T) in place and returns the passes, (B,).
        """
        num_masked = int((x[0] == self.mask_index).sum())
        for _ in range(num_masked):
            order = torch.rand(x.shape, device=x.device, generator=generator)
            position = order.masked_fill(x != self.mask_index, -1.0).argmax(dim=1)  # (B,)
            at = torch.zeros_like(x, dtype=torch.bool).scatter(1, position[:, None], True)
            log_p = denoise(x, pattern=self.pattern, at=at)  # (B, V)
            x[at] = self._draw(log_p, generator=generator)
        return torch.full((len(x),), num_masked, device=x.device)

    def _ancestral(
        self, denoise: Denoiser, x: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        """T steps from t = 1 to 0; in a step to s each mask is revealed with probability 1 - s/t.

        The predicted tokens are drawn anew only after something was revealed, so a step that
        reveals nothing costs no pass. Fills `x` (B, T) in place and returns the passes, (B,).
        """
        nfe = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        stale = torch.ones(len(x), dtype=torch.bool, device=x.device)
        predicted = x.clone()
        for step in range(self.num_steps):
            stay = (self.num_steps - step - 1) / (self.num_steps - step)  # s / t
            u = torch.rand(x.shape, device=x.device, generator=generator)
            reveal = (x == self.mask_index) & (u >= stay)
            needs_pass = stale & reveal.any(dim=1)
            if needs_pass.any():
                masked = (x == self.mask_index) & needs_pass[:, None]
                log_p = denoise(x, pattern=self.pattern, at=masked)
                predicted[masked] = self._draw(log_p, generator=generator)
                nfe += needs_pass
                stale &= ~needs_pass
            x[reveal] = predicted[reveal]
            stale |= reveal.any(dim=1)
        return nfe

    def _draw(self, log_p: Tensor, *, generator: torch.Generator | None) -> Tensor:
        probs = nucleus(log_p.double().exp(), p=self.nucleus_p)
        return categorical(probs, generator=generator)
