"""Likelihoods of samplers that reveal a block in an order: a given one, or the network's choice.

A sampler's log p is the sum over its passes; tokens that one pass reveals are independent given
what was there before, so their log p add up. Shapes as in `subsets`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .passes import Passes


def fixed_order(name: str, *, block_size: int, tokens_per_pass: int) -> Tensor:
    """The pass in which each position of a block is revealed, (L,) int64.

    Args:
        name: `left_to_right`: neighbours together; `strided`: j, j + L/k, j + 2 L/k, ... together.
        block_size: L.
        tokens_per_pass: k, a divisor of L.
    """
    position = torch.arange(block_size)
    if name == "left_to_right":
        return position // tokens_per_pass
    return position % (block_size // tokens_per_pass)


def in_order(
    passes: Passes, free: Tensor, number: Tensor, *, num_passes: int
) -> tuple[Tensor, Tensor]:
    """Reveal each position in its pass.

    Args:
        passes: over the rows.
        free: (B, K, L) bool.
        number: the pass of each position, (R, B, K, L) or as much of it as differs.
        num_passes: how many there are.

    Returns:
        log p of each block (R, B, K) float64, and whether each row's tokens were always the most
        probable ones, (R, B).
    """
    number = number.expand(-1, *free.shape)
    total = free.new_zeros(number.shape[:-1], dtype=torch.float64)
    is_greedy = free.new_ones(number.shape[:2])
    for i in range(num_passes):
        masked, asked = free & (number >= i), free & (number == i)
        log_p, is_best, _ = passes.read(masked.flatten(2), asked.flatten(2))
        total += log_p.unflatten(2, (-1, free.shape[-1])).sum(dim=-1)
        is_greedy &= is_best.all(dim=-1)
    return total, is_greedy


def in_chosen_order(
    passes: Passes,
    free: Tensor,
    *,
    priority: Callable[[Tensor], Tensor],
    tokens_per_pass: int,
) -> tuple[Tensor, Tensor]:
    """Reveal in each pass the k masks of a block with the highest priority; of equals the first.

    Args:
        passes, free: as in `in_order`.
        priority: of log p (m, V), see `sampling.reveal.PRIORITIES`.
        tokens_per_pass: k.

    Returns:
        As `in_order`, with R = 1.
    """
    size = free.shape[-1]
    masked = free[None].clone()
    total = free.new_zeros(masked.shape[:-1], dtype=torch.float64)
    is_greedy = free.new_ones(masked.shape[:2])
    for _ in range(math.ceil(size / tokens_per_pass)):
        asked = masked.flatten(2)
        found = passes.read(asked, asked, priority=priority)
        log_p, is_best, wanted = (x.unflatten(2, (-1, size)) for x in found)
        rank = wanted.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        revealed = masked & (rank < tokens_per_pass)
        total += (log_p * revealed).sum(dim=-1)
        is_greedy &= (is_best | ~revealed).flatten(2).all(dim=-1)
        masked = masked & ~revealed
    return total, is_greedy


def random_orders(
    passes: Passes, free: Tensor, *, num_orders: int, generator: torch.Generator | None
) -> Tensor:
    """log p of each block under uniformly random orders, one token at a time, (S, B, K).

    The log of their mean is a lower bound on log p of the first-hitting sampler, in expectation: by
    Jensen's inequality, tighter with each order (importance-weighted bound, arXiv 1509.00519, thm.
    1); of one order it is the NELBO.
    """
    size, found = free.shape[-1], []
    for num in (len(part) for part in torch.arange(num_orders).split(passes.at_once)):
        u = torch.rand((num, *free.shape), device=free.device, generator=generator)
        number = u.masked_fill(~free, 2.0).argsort(dim=-1).argsort(dim=-1)
        found.append(in_order(passes, free, number, num_passes=size)[0])
    return torch.cat(found)
