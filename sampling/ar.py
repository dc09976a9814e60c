"""Autoregressive sampling, token by token."""

from dataclasses import dataclass

import torch

from models.masks import AttentionPattern
from objectives import Denoiser

from .base import SamplerOutput
from .decoding import categorical, nucleus
from .semi_ar import CONTEXT_WINDOW


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler:
    """Draws each token given the ones before it; position 0 is BOS.

    Args:
        bos_index: id of BOS.
        nucleus_p: as in `decoding.nucleus`.
    """

    bos_index: int
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
        text = torch.full((batch_size, 1), self.bos_index, device=device)
        while text.shape[1] < length:
            window = text[:, -CONTEXT_WINDOW:]
            last = torch.zeros_like(window, dtype=torch.bool)
            last[:, -1] = True
            log_p = denoise(window, pattern=AttentionPattern.CAUSAL, at=last)  # (B, V)
            probs = nucleus(log_p.double().exp(), p=self.nucleus_p)
            text = torch.cat((text, categorical(probs, generator=generator)[:, None]), dim=1)
        nfe = torch.full((batch_size,), length - 1, device=device)
        return SamplerOutput(tokens=text, num_forward_passes=nfe)
