"""From probabilities to tokens."""

import torch
from torch import Tensor


def nucleus(probs: Tensor, *, p: float) -> Tensor:
    """Keep the most probable tokens whose cumulative probability is at most p.

    The token that crosses p is dropped, and the most probable one always stays. (Elsewhere the
    crossing token is usually kept; the published samples are made with this rule.)

    Args:
        probs: (..., V).
        p: in (0, 1]; 1 keeps everything.

    Returns:
        Renormalised probabilities (..., V).
    """
    if p >= 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(dim=-1) <= p
    keep[..., 0] = True
    kept = torch.zeros_like(probs).scatter(-1, order, ordered * keep)
    return kept / kept.sum(dim=-1, keepdim=True)


def categorical(probs: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """One draw per row of unnormalised probabilities (..., V), in float64 -> (...) int64.

    The smallest of independent exponential waiting times with these rates wins (Gumbel-max on
    another scale); float32 noise would distort the tail of a large vocabulary.
    """
    probs = probs.double()
    waiting = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / waiting).argmax(dim=-1)
