"""In which pass each masked token of a block is revealed.

The orders are drawn before the network is asked, because they do not depend on its answers. So
only the positions that a pass reveals need logits.
"""

import torch
from torch import Tensor

NOT_MASKED = -1


def passes_of(number: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where each pass of a block reveals tokens: rows and columns (n,), row after row.

    All passes at once: a GPU is waited for once, to learn how many positions each has.

    Args:
        number: the pass of each mask, below L, and `NOT_MASKED` elsewhere, (B, L) int64.
    """
    flat, width = number.flatten(), number.shape[1]
    counts = torch.zeros(width + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat - NOT_MASKED, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    sizes = counts.tolist()
    rows, columns = (order // width).split(sizes), (order % width).split(sizes)
    return list(zip(rows, columns, strict=True))[1:]


def one_by_one(masked: Tensor, *, u: Tensor, tokens_per_step: int = 1) -> Tensor:
    """First-hitting: masks are revealed in a uniformly random order (paper appendix B.1).

    The time of a step, t <- t u^(1/n) with n masks left, is bookkeeping: the network sees no time,
    and which mask goes next is uniform.

    Args:
        masked: (B, L) bool.
        u: uniform numbers (B, L).
        tokens_per_step: masks revealed together; 1 is exact.

    Returns:
        The pass of each mask, from 0, (B, L) int64; `NOT_MASKED` elsewhere.
    """
    rank = u.masked_fill(~masked, 2.0).argsort(dim=1).argsort(dim=1)
    return (rank // tokens_per_step).masked_fill(~masked, NOT_MASKED)


def on_time_grid(masked: Tensor, *, u: Tensor, num_steps: int) -> Tensor:
    """Ancestral sampling on a grid of T steps from t = 1 to t = 0.

    A step from t to s reveals each mask with probability 1 - s/t. On an even grid this makes the
    step of each mask uniform over the T steps, independently. Steps that reveal nothing need no
    pass, so only the others are numbered; masks of one step are revealed together.

    Args:
        masked, u: as in `one_by_one`.
        num_steps: T.

    Returns:
        As in `one_by_one`.
    """
    step = (u * num_steps).long().masked_fill(~masked, -1)
    ordered, order = step.sort(dim=1)
    is_new = torch.zeros_like(ordered)
    is_new[:, 1:] = ordered[:, 1:] > ordered[:, :-1]
    is_new[:, 0] = ordered[:, 0] >= 0
    return torch.zeros_like(step).scatter(1, order, is_new.cumsum(dim=1) - 1)


def confident(masked: Tensor, *, confidence: Tensor, threshold: float) -> Tensor:
    """Masks whose best token has at least this probability, and the best of each row in any case.

    Args:
        masked: (B, L) bool.
        confidence: probability of the most probable token, (B, L).
        threshold: in (0, 1].

    Returns:
        (B, L) bool.
    """
    confidence = confidence.masked_fill(~masked, -1.0)
    best = torch.zeros_like(masked).scatter(1, confidence.argmax(dim=1, keepdim=True), True)
    return masked & (best | (confidence >= threshold))


def confidence(log_p: Tensor) -> Tensor:
    """The probability of the most probable token, (n,), for log p (n, V)."""
    return log_p.amax(dim=-1).exp()


def margin(log_p: Tensor) -> Tensor:
    """By how much the most probable token leads the next (arXiv 2502.06768), (n,), of (n, V)."""
    first, second = log_p.topk(2, dim=-1).values.exp().unbind(dim=-1)
    return first - second


def certainty(log_p: Tensor) -> Tensor:
    """Minus the entropy in nats, (n,), for log p (n, V)."""
    return (log_p.exp() * log_p).sum(dim=-1)


# What a deterministic order reveals first: where this is largest.
PRIORITIES = {"confidence": confidence, "margin": margin, "entropy": certainty}
