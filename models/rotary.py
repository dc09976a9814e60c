"""Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half form."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Angles of the rotary embedding; `inv_freq` is part of the checkpoint format.

    Args:
        head_dim: d, even.
        base: wavelength base.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.register_buffer("inv_freq", self.frequencies())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """As in torch, but `model.half()` and the like leave the angles their digits."""
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype.itemsize < kept.dtype.itemsize:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def frequencies(self) -> Tensor:
        """base^(-2i/d) for i = 0 .. d/2 - 1, shape (d/2,)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return self.base**-exponents

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for integer positions (T,) or (B, T), float32.

        Returns:
            Two tensors of shape (1, 1, T, d/2) or (B, 1, T, d/2), ready to broadcast over heads.
        """
        angles = positions.float()[..., None] * self.inv_freq.float()
        angles = angles.reshape(-1, 1, *angles.shape[-2:])
        return angles.cos(), angles.sin()


def rotate(x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of queries or keys (..., d), by angles that broadcast.

    In float32, also where they are in half precision. Over whole heads at a time: on a CPU half a
    head is too short for its vectors.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
