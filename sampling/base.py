"""What a sampler is, and what it returns."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from objectives import Denoiser


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """Sampled rows.

    Attributes:
        tokens: (B, length) int64, without mask tokens.
        num_forward_passes: network evaluations that each row took part in (nfe), (B,) int64.
    """

    tokens: Tensor
    num_forward_passes: Tensor


class Sampler(Protocol):
    """Draws token rows from a denoiser."""

    def sample(
        self,
        denoise: Denoiser,
        *,
        batch_size: int,
        length: int,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> SamplerOutput:
        """Draw `batch_size` rows of `length` tokens.

        Args:
            denoise: the network and its parameterization.
            batch_size: B.
            length: tokens per row, BOS included.
            device: where the network is.
            generator: on that device; None uses the global one.
        """
        ...
