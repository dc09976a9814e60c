"""Dropout of 16 random bits beside torch's."""

import pytest
import torch
import torch.nn.functional as F

from models.kernels.dropout import dropout, keep_mask


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_each_number_stays_with_its_chance(p):
    """Also in the first and the last lane of a word, and next to one that dropped."""
    torch.manual_seed(0)
    kept = keep_mask(torch.Size((1001, 403)), p=p)
    spread = (p * (1 - p) / kept.numel()) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * spread + 2**-17)
    flat = kept.flatten()
    for lane in range(4):
        mean = flat[lane::4].float().mean().item()
        assert mean == pytest.approx(1 - p, abs=10 * spread + 2**-17)
    both = (flat[1:] & flat[:-1]).float().mean().item()
    assert both == pytest.approx((1 - p) ** 2, abs=10 * spread + 2**-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype):
    """What stays is scaled so that the mean stays; a gradient goes where its number went."""
    torch.manual_seed(0)
    x = torch.ones(64, 129, dtype=dtype, requires_grad=True)
    out = dropout(x, p=0.25, training=True)
    assert out.dtype == dtype
    assert set(out.unique().tolist()) == {0.0, torch.tensor(4 / 3).to(dtype).item()}
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_draws_anew_and_again():
    x = torch.ones(1000)
    torch.manual_seed(1)
    first, second = (dropout(x, p=0.5, training=True) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, p=0.5, training=True), first)


@pytest.mark.parametrize(("p", "training"), [(0.1, False), (0.0, True), (1.0, True)])
def test_the_rest_is_torch_s(p, training):
    x = torch.randn(5, 7)
    assert torch.equal(dropout(x, p=p, training=training), F.dropout(x, p=p, training=training))
