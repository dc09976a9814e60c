"""Likelihood metrics and the entropy of a text."""

import math

import pytest
import torch

from evaluation.metrics import likelihood_metrics, token_entropy


def test_means_run_over_tokens_not_over_batches():
    """Two batches of unequal size: every token counts once, and masked ones not at all."""
    metrics = likelihood_metrics("val/")
    losses = [torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]), torch.tensor([[6.0, 9.0, 9.0]])]
    masks = [torch.tensor([[1, 1, 0], [1, 1, 0]]), torch.tensor([[1, 0, 0]])]
    for loss, mask in zip(losses, masks, strict=True):
        metrics.update(loss, mask)
    found = {k: v.item() for k, v in metrics.compute().items()}
    nll = (1 + 2 + 3 + 4 + 6) / 5
    assert found == {
        "val/nll": pytest.approx(nll),
        "val/bpd": pytest.approx(nll / math.log(2)),
        "val/ppl": pytest.approx(math.exp(nll)),
        "val/tokens": 5,
        "val/rows": 3,
    }


def test_many_small_terms_are_not_lost():
    """Sums are float64: in float32 a total of 2^24 swallows every further 1."""
    metrics = likelihood_metrics("val/")
    metrics.update(torch.full((1, 1), 2.0**24), torch.ones(1, 1))
    for _ in range(10):
        metrics.update(torch.ones(1, 1), torch.ones(1, 1))
    assert metrics["nll"].total.item() + metrics["bpd"].total.item() >= 2**24 + 10
    assert metrics.compute()["val/nll"].item() == pytest.approx((2**24 + 10) / 11)


def test_gradients_are_not_kept():
    metrics = likelihood_metrics("val/")
    metrics.update(torch.ones(1, 2, requires_grad=True), torch.ones(1, 2))
    assert not metrics.compute()["val/nll"].requires_grad


def test_reset_forgets():
    metrics = likelihood_metrics("val/")
    metrics.update(torch.full((1, 2), 100.0), torch.ones(1, 2))
    metrics.reset()
    metrics.update(torch.ones(1, 2), torch.ones(1, 2))
    assert metrics.compute()["val/nll"] == 1.0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([7, 7, 7, 7], 0.0), ([1, 2, 3, 4], math.log(4)), ([5, 5, 5, 9], 0.5623351446)],
)
def test_entropy_of_a_histogram(tokens, expected):
    assert token_entropy(torch.tensor(tokens)) == pytest.approx(expected)
