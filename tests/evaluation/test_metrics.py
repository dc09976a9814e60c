"""Likelihood metrics and the entropy of a text."""

import math

import pytest
import torch

from evaluation.metrics import error_metrics, likelihood_metrics, token_entropy


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


def test_errors_are_those_of_a_mean_per_token():
    """By the definition, of rows of several lengths in batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 5, 1, 2, 5])[:, None]).long()
    variance = torch.rand(7, generator=generator, dtype=torch.float64)
    metrics = error_metrics("val/")
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        metrics.update(losses[rows], mask[rows], variance=variance[rows])
    found = metrics.compute()
    nats, tokens = (losses * mask).sum(dim=1), mask.sum(dim=1)
    residuals = nats - nats.sum() / tokens.sum() * tokens
    expected = (residuals.square().sum() * 7 / 6).sqrt() / tokens.sum()
    assert found["val/nll_se"].item() == pytest.approx(expected.item())
    assert found["val/nll_mc_se"].item() == pytest.approx(
        math.sqrt(variance.sum()) / tokens.sum().item()
    )


def test_rows_that_are_as_long_have_the_usual_standard_error():
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 8.0]])
    metrics = error_metrics("val/")
    metrics.update(losses, torch.ones(3, 2))
    usual = losses.mean(dim=1).std() / math.sqrt(3)
    assert metrics.compute()["val/nll_se"].item() == pytest.approx(usual.item())


def test_errors_that_nobody_knows():
    """Of a single row, and where nothing was drawn twice."""
    metrics = error_metrics("val/")
    metrics.update(torch.ones(1, 2), torch.ones(1, 2))
    assert all(math.isnan(value) for value in metrics.compute().values())
