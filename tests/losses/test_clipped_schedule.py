"""The search for the clipped schedule (its golden values are in tests/parity)."""

import itertools

import pytest
import torch

from losses.clipped_schedule import (
    MAX_BATCHES,
    ClippedScheduleSearch,
    candidate_intervals,
    logged_name,
)
from losses.forward_process import FULL, NLL, ClipInterval


def block_losses(seed: int, *, scale: float = 1.0, shape: tuple[int, int] = (4, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 + scale * torch.randn(shape, generator=generator)


def test_candidates_of_the_default_widths():
    """(1e-3, 1), then for each width the starts 0, 0.05, ... up to 1 - width."""
    found = candidate_intervals(block_size=4, widths=[0.5, 0.7], delta=0.05)
    assert found[0] == FULL
    assert [(i.low, i.high) for i in found[1:12]] == [
        (0.001, 0.5), (0.05, 0.55), (0.1, 0.6), (0.15, 0.65), (0.2, 0.7), (0.25, 0.75),
        (0.3, 0.8), (0.35, 0.85), (0.4, 0.9), (0.45, 0.95), (0.5, 1.0),
    ]  # fmt: skip
    assert [(i.low, i.high) for i in found[12:]] == [
        (0.001, 0.7), (0.05, 0.75), (0.1, 0.8), (0.15, 0.85), (0.2, 0.9), (0.25, 0.95), (0.3, 1.0),
    ]  # fmt: skip


def test_no_widths_leave_the_full_range():
    assert candidate_intervals(block_size=4, widths=[], delta=0.05) == [FULL]


def test_single_tokens_have_two_candidates():
    """At L = 1 the alternative is to mask everything, which is the exact likelihood."""
    assert candidate_intervals(block_size=1, widths=[0.5], delta=0.05) == [FULL, NLL]


@pytest.mark.parametrize(("width", "delta"), [(0.3, 0.1), (0.9, 0.02), (0.55, 0.15)])
def test_the_last_start_is_not_lost_to_rounding(width, delta):
    """(1 - 0.9) / 0.02 is 4.999999999999999 in floating point; the fifth start counts."""
    found = candidate_intervals(block_size=4, widths=[width], delta=delta)
    starts = [i.low for i in found[1:]]
    assert starts[-1] == pytest.approx(1 - width)
    assert len(found) == 1 + 1 + round((1 - width) / delta)


def test_candidates_are_distinct_and_named_apart():
    found = candidate_intervals(block_size=4, widths=[0.5, 0.6, 0.7, 0.8, 0.9], delta=0.05)
    assert len(set(found)) == len(found) == 36
    assert len({logged_name(interval) for interval in found}) == 36


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (FULL, "valid_var_0.0 - 1"),
        (ClipInterval(0.5, 1.0), "valid_var_0.5 - 1.0"),
        (ClipInterval(0.05, 0.55), "valid_var_0.05 - 0.55"),
        (ClipInterval(1e-3, 0.5), "valid_var_0.0 - 0.5"),
    ],
)
def test_logged_names_are_the_originals(interval, expected):
    assert logged_name(interval) == expected


def test_score_is_the_mean_variance_of_the_batches():
    intervals = [FULL, ClipInterval(0.3, 0.8)]
    search = ClippedScheduleSearch(intervals)
    for (i, interval), batch_idx in itertools.product(enumerate(intervals), range(3)):
        search.update(interval, block_losses(10 * i + batch_idx), batch_idx=batch_idx)
    expected = [
        torch.stack([block_losses(10 * i + batch).var() for batch in range(3)]).mean()
        for i in range(2)
    ]
    torch.testing.assert_close(search.compute(), expected)


def test_variance_is_within_batches_not_between_them():
    """A batch of hard text raises all its losses; that must not count against a range."""
    search = ClippedScheduleSearch([FULL])
    for batch_idx in range(4):
        search.update(FULL, torch.full((2, 3), 10.0 * batch_idx), batch_idx=batch_idx)
    assert search.compute()[0].item() == pytest.approx(0, abs=1e-9)


def test_small_variances_of_large_losses_survive():
    """Sums of squares cancel; in float32 nothing would be left of a variance of 1e-4 at 1,000."""
    search = ClippedScheduleSearch([FULL])
    losses = 1000 + 0.01 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).double()
    search.update(FULL, losses, batch_idx=0)
    assert search.compute()[0].item() == pytest.approx(losses.var().item(), rel=1e-3)


def test_best_has_the_least_variance():
    intervals = [FULL, ClipInterval(0.3, 0.8), ClipInterval(0.5, 1.0)]
    search = ClippedScheduleSearch(intervals)
    for interval, scale in zip(intervals, (2.0, 0.5, 1.0), strict=True):
        search.update(interval, block_losses(0, scale=scale), batch_idx=0)
    assert search.best() == intervals[1]


def test_the_earlier_of_equals_is_best():
    intervals = [FULL, ClipInterval(0.3, 0.8)]
    search = ClippedScheduleSearch(intervals)
    for interval in intervals:
        search.update(interval, block_losses(0), batch_idx=0)
    assert search.best() == FULL


def test_a_range_from_the_buffers_is_found():
    """The range in use comes from float32 buffers; it must be the candidate it once was."""
    intervals = candidate_intervals(block_size=4, widths=[0.5], delta=0.05)
    search = ClippedScheduleSearch(intervals)
    low, high = torch.tensor([intervals[3].low, intervals[3].high], dtype=torch.float32)
    search.update(ClipInterval(low.item(), high.item()), block_losses(0), batch_idx=0)
    assert search.moments[0, 3, 0] == 32


def test_ranks_add_up():
    """The variance is over the blocks of all ranks: two halves together equal the whole.

    Ranks may see different numbers of batches; an uneven end must neither hang nor be lost.
    """
    whole, *ranks = (ClippedScheduleSearch([FULL]) for _ in range(3))
    for batch_idx in range(3):
        losses = block_losses(batch_idx)
        parts = losses.chunk(2) if batch_idx < 2 else (losses, None)
        whole.update(FULL, losses, batch_idx=batch_idx)
        for rank, part in zip(ranks, parts, strict=True):
            if part is not None:
                rank.update(FULL, part, batch_idx=batch_idx)
    alone = ranks[0].compute()[0]
    ranks[0].moments += ranks[1].moments  # what torchmetrics does across processes
    ranks[0]._computed = None
    torch.testing.assert_close(ranks[0].compute(), whole.compute())
    assert not torch.allclose(alone, whole.compute()[0])


def test_one_candidate_is_still_a_list():
    """With no widths to search, the score was squeezed and validation ended in a TypeError."""
    search = ClippedScheduleSearch(candidate_intervals(block_size=4, widths=[], delta=0.05))
    search.update(FULL, block_losses(0), batch_idx=0)
    assert len(list(zip(search.intervals, search.compute(), strict=True))) == 1
    assert search.best() == FULL


def test_reset_forgets():
    """Each validation starts anew."""
    search = ClippedScheduleSearch([FULL])
    search.update(FULL, block_losses(0, scale=9.0), batch_idx=0)
    search.reset()
    search.update(FULL, block_losses(1), batch_idx=0)
    torch.testing.assert_close(search.compute()[0], block_losses(1).var())


def test_all_hundred_batches_fit():
    search = ClippedScheduleSearch([FULL])
    search.update(FULL, block_losses(0), batch_idx=MAX_BATCHES - 1)
    assert MAX_BATCHES == 100
    torch.testing.assert_close(search.compute()[0], block_losses(0).var())


def test_gradients_are_not_kept():
    search = ClippedScheduleSearch([FULL])
    search.update(FULL, block_losses(0).requires_grad_(), batch_idx=0)
    assert not search.moments.requires_grad
