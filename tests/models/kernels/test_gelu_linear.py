"""GELU and linear layer as one, beside the two as torch has them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.kernels import gelu_linear as module
from models.kernels.gelu_linear import gelu_linear
from tests.helpers.references import generator


@pytest.fixture(autouse=True)
def recomputed_at_any_size(monkeypatch):
    monkeypatch.setattr(module, "RECOMPUTED_FROM", 0)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(12, 5).to(torch.promote_types(dtype, torch.float32))
    return torch.randn(2, 7, 12, generator=generator()).to(dtype).requires_grad_(), linear


def gradients(out: torch.Tensor, h: torch.Tensor, linear: nn.Linear) -> list[torch.Tensor]:
    upstream = torch.randn(out.shape, generator=generator(1)).to(out.dtype)
    return list(torch.autograd.grad(out, [h, linear.weight, linear.bias], upstream))


def test_values_and_gradients_in_float64():
    h, linear = inputs(torch.float64)
    found, expected = gelu_linear(h, linear), linear(F.gelu(h, approximate="tanh"))
    assert torch.equal(found, expected)
    for a, b in zip(gradients(found, h, linear), gradients(expected, h, linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_values_and_gradients_in_bf16_autocast():
    h, linear = inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = gelu_linear(h, linear), linear(F.gelu(h, approximate="tanh"))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    for a, b in zip(gradients(found, h, linear), gradients(expected, h, linear), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("is_training", [True, False])
def test_keeps_its_input_and_nothing_of_its_size(is_training):
    h, linear = inputs(torch.float32)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.set_grad_enabled(is_training),
    ):
        gelu_linear(h, linear)
    wide = [tensor for tensor in kept if tensor.shape[-1] == 12 and tensor.ndim == 3]
    assert [tensor.data_ptr() for tensor in wide] == ([h.data_ptr()] if is_training else [])


def test_keeps_both_where_they_are_small(monkeypatch):
    """Less time for a little memory."""
    h, linear = inputs(torch.float32)
    monkeypatch.setattr(module, "RECOMPUTED_FROM", h.numel() + 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu_linear(h, linear)
    assert sum(tensor.numel() == h.numel() for tensor in kept) == 2
