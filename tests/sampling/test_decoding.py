"""Nucleus truncation and categorical draws."""

import math

import pytest
import torch

from sampling import decoding
from sampling.decoding import Decoding, categorical, nucleus, top_k
from tests.helpers.references import p_value


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


def test_the_standard_rule_keeps_the_crossing_token():
    probs = torch.tensor([0.25, 0.5, 0.125, 0.125], dtype=torch.float64)
    kept = nucleus(probs, p=0.7, keeps_crossing=True)
    torch.testing.assert_close(kept, torch.tensor([1 / 3, 2 / 3, 0, 0]).double())


@pytest.mark.parametrize("keeps_crossing", [False, True])
def test_nucleus_among_candidates_equals_the_full_sort(keeps_crossing, monkeypatch):
    """Rows whose nuclei lie among the first candidates, the next ones, and all tokens."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 5_000, generator=generator, dtype=torch.float64)
    logits = torch.tensor([6.0, 0.1, 2.5, 6.0, 0.5, 3.0])[:, None] * noise
    fast = nucleus(logits.softmax(dim=-1), p=0.9, keeps_crossing=keeps_crossing)
    monkeypatch.setattr(decoding, "CANDIDATES", 5_000)
    plain = nucleus(logits.softmax(dim=-1), p=0.9, keeps_crossing=keeps_crossing)
    assert torch.equal(fast > 0, plain > 0)
    torch.testing.assert_close(fast, plain, rtol=1e-12, atol=0)
    sizes = (fast > 0).sum(dim=-1)
    assert sizes.min() < 256 and ((sizes > 256) & (sizes < 1024)).any() and sizes.max() > 4096


@pytest.mark.parametrize("rule", ["paper", "standard"])
def test_draws_among_candidates_equal_those_among_all(rule):
    """One nucleus of a few tokens, one of hundreds, one of thousands; the same u."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 5_000, generator=generator, dtype=torch.float64)
    log_p = (torch.tensor([6.0, 2.5, 0.1])[:, None] * noise).log_softmax(dim=-1)
    log_p = log_p.repeat_interleave(200, dim=0)
    u = torch.rand(600, generator=generator, dtype=torch.float64)
    tokens, confidence = Decoding(nucleus_p=0.9, nucleus_rule=rule).draw(log_p, u=u)
    kept = nucleus(log_p.exp(), p=0.9, keeps_crossing=rule == "standard")
    expected = categorical(kept, u=u)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(confidence, kept.gather(-1, expected[:, None])[:, 0])


def test_top_k_keeps_the_best():
    probs = torch.tensor([0.1, 0.5, 0.4], dtype=torch.float64)
    torch.testing.assert_close(top_k(probs, k=2), torch.tensor([0, 5 / 9, 4 / 9]).double())
    assert torch.equal(top_k(probs, k=3), probs)


def test_temperature_sharpens_down_to_the_best():
    log_p = torch.tensor([0.2, 0.8]).log()
    assert Decoding(temperature=0).probs(log_p).tolist() == [0, 1]
    expected = torch.tensor([0.04, 0.64]).double() / 0.68
    torch.testing.assert_close(
        Decoding(temperature=0.5).probs(log_p), expected, rtol=1e-6, atol=1e-6
    )


def test_categorical_draws_in_proportion():
    """Unnormalised weights; what has none is never drawn."""
    weights = torch.tensor([2.0, 0.0, 5.0, 1.0, 0.0]).expand(40_000, 5)
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = categorical(weights, u=u).bincount(minlength=5).float()
    assert counts[1] == counts[4] == 0
    assert p_value(counts[[0, 2, 3]], torch.tensor([2.0, 5.0, 1.0]) / 8 * 40_000) > 1e-3


def test_categorical_at_the_ends_of_the_unit_interval():
    """Rounding never leads to a token behind the last possible one, nor to an impossible first."""
    weights = torch.tensor([[0.0, 0.3, 0.1, 0.0]], dtype=torch.float64)
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert categorical(weights, u=almost_one).item() == 2
    assert categorical(weights, u=torch.zeros(1, dtype=torch.float64)).item() == 1


def test_categorical_is_computed_in_float64():
    """Float32 sums cannot tell the tail of a large vocabulary apart."""
    weights = torch.full((1, 60_000), 1e-9)
    weights[0, 0] = 1.0
    u = torch.tensor([(1 + 30_000.5e-9) / (1 + 59_999e-9)], dtype=torch.float64)
    assert abs(categorical(weights, u=u).item() - 30_001) <= 1


def test_draws_from_a_flat_distribution_have_its_entropy():
    """A million draws of GPT-2's 50,257 tokens, one distribution (V,) for all u (n,).

    The entropy of a histogram is too low: with a chi-square X of V - 1 degrees of freedom it is
    log V - X / 2n and smaller terms. So (V - 1) / 2n is missing in the mean, as Miller and Madow
    found, 0.025 nats, and the standard error is sqrt(2 (V - 1)) / 2n, 0.00016. The mean is exact
    below, where each count is binomial: log n - (V / n) E[count log count].
    """
    size, num = 50_257, 1_000_000
    u = torch.rand(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = categorical(torch.ones(size), u=u).bincount(minlength=size)
    assert len(counts) == size and counts.sum() == num
    p = counts[counts > 0].double() / num
    entropy = -(p * p.log()).sum().item()
    k = torch.arange(1, 400, dtype=torch.float64)
    n = torch.tensor(float(num), dtype=torch.float64)
    log_binomial = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    share = (log_binomial - k * math.log(size) + (n - k) * math.log1p(-1 / size)).exp()
    expected = math.log(num) - size / num * (share * k * k.log()).sum().item()
    missing, error = (size - 1) / (2 * num), math.sqrt(2 * (size - 1)) / (2 * num)
    assert math.log(size) - expected == pytest.approx(missing, rel=0.02)
    assert abs(entropy - expected) < 4 * error


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """The Gumbel trick in float32 hardly draws a token of probability 1e-8 (2409.02908).

    Its uniform numbers are multiples of 2^-24, so that -log(-log(u)) ends at 16.6, and the rare
    token's would have to be 18.4 above the other's. The sum below has each of its values u and
    the exact chance exp(-exp(-x)) that the other's is below x; below 1 - 2^-12 nothing is left.
    """
    p = 1e-8
    u = 1 - torch.arange(1, 2**12 + 1, dtype=torch.float64) / 2**24  # exact in float32 too
    gumbel = -torch.log(-torch.log(u.float()))
    logit = math.log(p) - math.log1p(-p)
    drawn = (-(-(gumbel.double() + logit)).exp()).exp().sum().item() / 2**24
    assert drawn < p / 10
    # Inverse CDF in float64: the last fourth of the u in the last 4 p of the unit interval.
    u = 1 - 4 * p * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert categorical(torch.tensor([1 - p, p], dtype=torch.float64), u=u).sum() == 250
