"""Nucleus truncation and categorical draws."""

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
