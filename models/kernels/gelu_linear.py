"""GELU and the linear layer behind it, keeping for the backward pass the input of both alone.

Autograd would keep what GELU returns as well. That is the widest activation of the network, and
computing it anew takes a few per cent of a step: worth it where memory is what limits a batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers from which on GELU is computed twice: 16 MB in float32.
RECOMPUTED_FROM = 2**22


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        h, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # frozen beside an adapter
            grad_weight = torch.mm(rows.t(), F.gelu(h, approximate="tanh").flatten(0, -2))
        grad_h = torch.ops.aten.gelu_backward(grad @ weight, h, approximate="tanh")
        return grad_h, grad_weight, rows.sum(dim=0)


def gelu_linear(h: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(h)), with the tanh form of GELU; (..., K) -> (..., M).

    Args:
        h: in the precision of the matrix products.
        linear: from K to M, with a bias; see `plain.is_plain`.
    """
    if not torch.is_grad_enabled() or h.numel() < RECOMPUTED_FROM:
        return linear(F.gelu(h, approximate="tanh"))
    weight, bias = linear.weight.to(h.dtype), linear.bias.to(h.dtype)
    with torch.autocast(h.device.type, enabled=False):
        return _GeluLinear.apply(h, weight, bias)
