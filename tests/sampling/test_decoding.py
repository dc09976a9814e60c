"""Nucleus truncation and categorical draws."""

import pytest
import torch

from sampling.decoding import categorical, nucleus
from tests.references import p_value


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1.0, [0.25, 0.5, 0.125, 0.125]),
        (0.75, [1 / 3, 2 / 3, 0, 0]),
        (0.7, [0, 1, 0, 0]),  # 0.5 + 0.25 crosses 0.7, and is dropped
        (0.5, [0, 1, 0, 0]),
        (0.4, [0, 1, 0, 0]),  # the top token crosses p itself, and stays
        (0.875, [2 / 7, 4 / 7, 1 / 7, 0]),
    ],
)
def test_nucleus_drops_the_token_that_crosses(p, expected):
    """Published samples are made with this rule; elsewhere the crossing token is kept."""
    probs = torch.tensor([0.25, 0.5, 0.125, 0.125], dtype=torch.float64)
    torch.testing.assert_close(nucleus(probs, p=p), torch.tensor(expected).double())


def test_nucleus_treats_each_row_alone_and_changes_nothing():
    probs = torch.tensor([[[0.6, 0.4], [0.1, 0.9]]], dtype=torch.float64)
    before = probs.clone()
    assert nucleus(probs, p=0.6).tolist() == [[[1, 0], [0, 1]]]
    assert torch.equal(probs, before)


def test_categorical_draws_in_proportion():
    """Unnormalised weights; what has none is never drawn."""
    weights = torch.tensor([2.0, 0.0, 5.0, 1.0]).expand(40_000, 4)
    drawn = categorical(weights, generator=torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=4).float()
    assert p_value(counts, weights[0] / 8 * 40_000) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_categorical_is_computed_in_float64(dtype, monkeypatch):
    """Float32 noise cannot tell 50,000 small probabilities apart."""
    seen = []
    exponential = torch.Tensor.exponential_

    def watch(self, *args, **kwargs):
        seen.append(self.dtype)
        return exponential(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "exponential_", watch)
    categorical(torch.rand(4, 50).to(dtype))
    assert seen == [torch.float64]


def test_categorical_shapes_and_seeds():
    probs = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1))
    one, two = (categorical(probs, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert one.shape == (2, 3) and one.dtype == torch.int64 and torch.equal(one, two)
