"""Linear layers whose weights lie as oneDNN's bf16 kernels read them, for inference on a CPU.

`F.linear` has to reorder a weight in every call, which takes longer than a product with a few rows.
The numbers are the same. torch has these operators for its own compiler and does not promise to
keep them: where they are missing, weights stay as they are.
"""

import torch
from torch import Tensor, nn


def can_pack(weight: Tensor) -> bool:
    """Whether there is a kernel for packed weights of this precision, on this device."""
    ops = torch.ops.mkldnn
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    is_bf16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return (
        is_bf16_on_cpu
        and torch.backends.mkldnn.is_available()
        and all(hasattr(ops, name) for name in names)
        and ops._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """Called as `nn.Linear` is, in the precision of its weight. `torch.compile` cannot take it.

    Args:
        weight: (out, in), see `can_pack`; a copy is kept.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self._product(x, function="none", approximate="")

    def gelu(self, x: Tensor) -> Tensor:
        """GELU, in its approximation by tanh, of the output."""
        return self._product(x, function="gelu", approximate="tanh")

    def _product(self, x: Tensor, *, function: str, approximate: str) -> Tensor:
        x = x.to(self.weight.dtype)
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.weight, self.bias, function, [], approximate)

