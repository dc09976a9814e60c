"""Masking within a range: the draw at once against the loop of redraws that it replaces."""

import itertools
import math

import pytest
import torch

from losses.forward_process import FULL, NLL, ClipInterval, q_xt_within
from tests.helpers.references import generator, p_value

MASK = 99
NUM_BLOCKS = 20_000


def within(x_0: torch.Tensor, p: float, **changes) -> torch.Tensor:
    """`q_xt_within` with one p for all blocks."""
    options = {
        "interval": ClipInterval(0.3, 0.8), "block_size": 4, "mask_index": MASK,
        "ignore_bos": False, "generator": generator(),
    } | changes  # fmt: skip
    num_blocks = x_0.shape[1] // options["block_size"]
    return q_xt_within(x_0, move_chance=torch.full((x_0.shape[0], num_blocks), p), **options)


def pattern_probabilities(p: float, interval: ClipInterval, block_size: int) -> torch.Tensor:
    """P(pattern) for all 2^L patterns: independent masks, given that their fraction lies inside.

    A bound of the full range does not bind.
    """
    weights = []
    for bits in itertools.product((0, 1), repeat=block_size):
        fraction = sum(bits) / block_size
        too_low = interval.low != FULL.low and fraction < interval.low - 1e-9
        too_high = interval.high != FULL.high and fraction > interval.high + 1e-9
        chance = math.prod(p if bit else 1 - p for bit in bits)
        weights.append(0.0 if too_low or too_high else chance)
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum()


def pattern_counts(is_masked: torch.Tensor) -> torch.Tensor:
    """How often each of the 2^L patterns occurs in blocks (n, L)."""
    place = 2 ** torch.arange(is_masked.shape[1] - 1, -1, -1)
    codes = (is_masked.long() * place).sum(dim=1)
    return codes.bincount(minlength=2 ** is_masked.shape[1]).double()


def redraw_until_inside(n: int, p: float, interval: ClipInterval, block_size: int) -> torch.Tensor:
    """The slow twin: draw masks of n blocks, redraw those whose fraction is outside."""
    g = generator(7)
    is_masked = torch.rand(n, block_size, generator=g) <= p
    while True:
        fraction = is_masked.double().mean(dim=1)
        outside = torch.zeros(n, dtype=torch.bool)
        if interval.low != FULL.low:
            outside |= fraction < interval.low - 1e-9
        if interval.high != FULL.high:
            outside |= fraction > interval.high + 1e-9
        if not outside.any():
            return is_masked
        again = torch.rand(int(outside.sum()), block_size, generator=g) <= p
        is_masked[outside] = again


RANGES = [
    (4, 0.5, ClipInterval(0.3, 0.8)),
    (4, 0.31, ClipInterval(0.3, 0.8)),
    (4, 0.2, ClipInterval(1e-3, 0.5)),  # one-sided
    (4, 0.95, ClipInterval(0.5, 1.0)),  # one-sided
    (5, 0.45, ClipInterval(0.2, 0.6)),
    (3, 0.7, FULL),
    (1, 0.4, FULL),
    (2, 0.3, ClipInterval(0.05, 0.55)),  # one count only
]


@pytest.mark.parametrize(("block_size", "p", "interval"), RANGES)
def test_distribution_is_that_of_redrawing(block_size, p, interval):
    """Chi-square over all 2^L patterns, for the fast draw and for the loop it replaces.

    The original redrew in a loop, which never ended where no count of masks fits the range.
    """
    expected = NUM_BLOCKS * pattern_probabilities(p, interval, block_size)
    x_0 = torch.zeros(NUM_BLOCKS // 4, 4 * block_size, dtype=torch.long)
    x_t = within(x_0, p, interval=interval, block_size=block_size)
    fast = (x_t == MASK).view(-1, block_size)
    slow = redraw_until_inside(NUM_BLOCKS, p, interval, block_size)
    for is_masked in (fast, slow):
        assert p_value(pattern_counts(is_masked), expected) > 1e-4


def test_the_comparison_can_fail():
    """Plain masking, or another p, is told apart with the same number of blocks."""
    interval = ClipInterval(0.3, 0.8)
    expected = NUM_BLOCKS * pattern_probabilities(0.5, interval, 4)
    other_p = redraw_until_inside(NUM_BLOCKS, 0.55, interval, 4)
    assert p_value(pattern_counts(other_p), expected) < 1e-9


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_every_block_lies_inside(ignore_bos):
    """Except that position 0 is made clean afterwards, as in the original."""
    x_0 = torch.arange(32).repeat(500, 1)
    x_t = within(x_0, 0.35, ignore_bos=ignore_bos)
    is_masked = x_t == MASK
    assert torch.equal(x_t[~is_masked], x_0[~is_masked])
    counts = is_masked.unflatten(1, (8, 4)).sum(dim=-1)
    first = counts[:, 0]
    rest = counts if not ignore_bos else counts[:, 1:]
    assert set(rest.unique().tolist()) == {2, 3}
    if ignore_bos:
        assert not is_masked[:, 0].any()
        assert set(first.unique().tolist()) == {1, 2, 3}


def test_every_block_has_its_own_p():
    x_0 = torch.zeros(4000, 8, dtype=torch.long)
    p = torch.tensor([0.35, 0.75]).expand(4000, 2)
    x_t = q_xt_within(
        x_0, move_chance=p, interval=ClipInterval(0.25, 0.8), block_size=4,
        mask_index=MASK, ignore_bos=False, generator=generator(),
    )  # fmt: skip
    rates = (x_t == MASK).unflatten(1, (2, 4)).float().mean(dim=(0, 2))
    for rate, chance in zip(rates, (0.35, 0.75), strict=True):
        probabilities = pattern_probabilities(chance, ClipInterval(0.25, 0.8), 4)
        bits = torch.tensor(list(itertools.product((0, 1), repeat=4))).double()
        expected = (probabilities @ bits).mean()
        assert abs(rate - expected) < 0.015


@pytest.mark.parametrize(("p", "count"), [(1e-3, 2), (0.9999, 3)])
def test_ends_where_fitting_draws_are_rare(p, count):
    """Redrawing would take thousands of rounds for a block; here the tail is drawn at once."""
    x_t = within(torch.zeros(200, 8, dtype=torch.long), p)
    counts = (x_t == MASK).unflatten(1, (2, 4)).sum(dim=-1)
    assert (counts == count).float().mean() > 0.98


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_exact_nll_at_one_token(ignore_bos):
    x_t = within(
        torch.zeros(20, 16, dtype=torch.long), 1.0,
        interval=NLL, block_size=1, ignore_bos=ignore_bos,
    )  # fmt: skip
    assert (x_t[:, 1:] == MASK).all()
    assert (x_t[:, 0] == (0 if ignore_bos else MASK)).all()


def test_large_blocks_stay_inside():
    x_t = within(
        torch.zeros(50, 1024, dtype=torch.long), 0.5,
        interval=ClipInterval(0.45, 0.55), block_size=1024,
    )  # fmt: skip
    fraction = (x_t == MASK).float().mean(dim=1)
    assert fraction.min() >= 0.45 and fraction.max() <= 0.55
    assert fraction.std() > 0.005


def test_no_fitting_count_names_the_key():
    """The original's loop never ended here."""
    with pytest.raises(ValueError, match=r"training.resample=true: .*block_size=2.*0.3, 0.4"):
        within(
            torch.zeros(2, 4, dtype=torch.long), 0.35,
            interval=ClipInterval(0.3, 0.4), block_size=2,
        )  # fmt: skip
