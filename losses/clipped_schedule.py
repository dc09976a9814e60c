"""The search for the clipped noise schedule: which range of t gives the loss the least variance.

Paper section 5.2 and equation 9: during validation every candidate range is tried, and the one
whose NELBO estimates vary least across blocks is what training uses from then on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from losses.forward_process import FULL, NLL, ClipInterval

MAX_BATCHES = 100


def candidate_intervals(
    *, block_size: int, widths: Sequence[float], delta: float
) -> list[ClipInterval]:
    """The ranges to try, the full one first.

    For each width w: starts 0, delta, ... up to 1 - w, floored like the full range. At L = 1 there
    are two candidates, everything from the full range and everything masked.

    Args:
        block_size: L.
        widths: `algo.clip_search_widths`, each in (0, 1).
        delta: `algo.clip_search_delta`, the step between starts.
    """
    if block_size == 1:
        return [FULL, NLL]
    found = [FULL]
    for width in widths:
        num_starts = int((1 - width) / delta + 1e-6) + 1
        starts = [i * delta for i in range(num_starts)]
        found += [ClipInterval(max(s, FULL.low), min(s + width, 1.0)) for s in starts]
    return found


def logged_name(interval: ClipInterval) -> str:
    """The name its variance is logged under, two decimals as in the original."""
    high = "1" if interval == FULL else str(round(interval.high, 2))
    return f"valid_var_{round(interval.low, 2)} - {high}"


class ClippedScheduleSearch(Metric):
    """Collects per-block losses of each candidate; knows the variances and the best range.

    The variance of one batch is taken over all its blocks on all ranks, and a candidate's score is
    the mean over at most `MAX_BATCHES` batches. Ranks add up counts, sums and sums of squares, so
    they need not agree on the number of batches.

    Args:
        intervals: the candidates.
    """

    full_state_update = False

    def __init__(self, intervals: Sequence[ClipInterval]):
        super().__init__()
        self.intervals = list(intervals)
        zeros = torch.zeros(3, len(self.intervals), MAX_BATCHES, dtype=torch.float64)
        self.add_state("moments", zeros, dist_reduce_fx="sum")
        self.moments: Tensor  # count, sum and sum of squares

    def update(self, interval: ClipInterval, block_losses: Tensor, *, batch_idx: int) -> None:
        """Add the mean losses per block (B, K) of one candidate on one batch."""
        losses = block_losses.detach().double()
        moments = torch.stack((torch.ones_like(losses).sum(), losses.sum(), losses.square().sum()))
        self.moments[:, self.intervals.index(interval), batch_idx] += moments

    def compute(self) -> list[Tensor]:
        """The score of each candidate, a scalar: the batches' mean variance."""
        count, total, squares = self.moments  # each (num_intervals, MAX_BATCHES)
        variance = (squares - total.square() / count.clamp(min=1)) / (count - 1).clamp(min=1)
        scores = (variance.sum(dim=-1) / (count > 0).sum(dim=-1)).float()
        return list(scores)  # torchmetrics would squeeze a tensor of one candidate

    def best(self) -> ClipInterval:
        """The candidate of the lowest score; the earlier one of equals."""
        return self.intervals[int(torch.stack(self.compute()).argmin())]
