"""Sums over the sets of a block's tokens that may be masked, all of them or drawn ones.

Tensors end in (B, K, L): rows, blocks, positions of a block. `free` says which tokens are neither
given nor behind the end of a text; a block masks some of these m.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .passes import Passes


def over_subsets(passes: Passes, free: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every set of positions that can be masked, in the same pass for all blocks.

    Yields:
        For R of the 2^L - 1 sets: which positions they are, (R, L); whether a block can mask all of
        them, (R, B, K); log p of the masked tokens given all others, (R, B, K, L), 0 elsewhere.
    """
    size = free.shape[-1]
    position = torch.arange(size, device=free.device)
    subsets = torch.arange(1, 2**size, device=free.device)[:, None] >> position & 1 == 1
    for some in subsets.split(passes.at_once):
        chosen = some[:, None, None]
        fits = (free | ~chosen).all(dim=-1)
        log_p = passes.log_p((chosen & fits[..., None]).flatten(2))
        yield some, fits, log_p.unflatten(2, (-1, size))


def exact_nelbo(passes: Passes, free: Tensor, *, counted: Tensor) -> Tensor:
    """The NELBO in continuous time (paper eq. 8), summed over all sets of masks, (B, K) nats.

    A set of n out of m tokens is masked with probability C(m, n)^-1 among those of its size, and
    integrating its share of the bound over t, int t^(n-1) (1-t)^(m-n) dt, gives each of its masked
    tokens the weight 1 / (n C(m, n)), whatever the schedule: t = 1 - alpha is the variable of
    integration in all of them.

    Drawn bounds lack what drawn times and floors leave out. Times below 0.001 are masked fractions
    below 0.001, 0.1 % of the range (0.14 % for `log`), but below 0.032 for `square_root`, 3 %; and
    `cosine` divides by p + 0.001, which takes 0.7 % away.

    Args:
        passes: over the rows.
        free: see above.
        counted: whose terms are summed, (B, K, L) bool.
    """
    total = free.new_zeros(free.shape[:2], dtype=torch.float64)
    num_free = free.sum(dim=-1).double()  # (B, K)
    for subsets, fits, log_p in over_subsets(passes, free):
        n = subsets.sum(dim=-1).double()[:, None, None]
        left = (num_free - n).clamp(min=0)  # below zero only where the set does not fit
        log_choose = (num_free + 1).lgamma() - (n + 1).lgamma() - (left + 1).lgamma()
        weight = fits / n * (-log_choose).exp()
        total -= (weight * (log_p * counted).sum(dim=-1)).sum(dim=0)
    return total


def stratified_nelbo(
    passes: Passes,
    free: Tensor,
    *,
    counted: Tensor,
    num_draws: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The same estimated: each number of masks 1..m once per block, which masks is drawn.

    Given their number n all sets are equally likely, so the mean over n C(m, n) terms of
    `exact_nelbo` becomes sum over n of 1 / n times the sum over one set of that size.

    Args:
        passes, free, counted: as in `exact_nelbo`.
        num_draws: D, how often.
        generator: on the device of `free`; None: torch's own stream.

    Returns:
        Each draw's estimate, (D, B, K) nats.
    """
    size = free.shape[-1]
    # Blocks of a pass have different numbers of masks, so that all passes are of one size.
    start = torch.arange(free[..., 0].numel(), device=free.device).view(free.shape[:2])
    steps = torch.arange(num_draws * size, device=free.device)
    parts = []
    for some in steps.split(passes.at_once):
        n = (start + some[:, None, None]) % size + 1  # (R, B, K)
        u = torch.rand((len(some), *free.shape), device=free.device, generator=generator)
        rank = u.masked_fill(~free, 2.0).argsort(dim=-1).argsort(dim=-1)
        fits = n <= free.sum(dim=-1)
        masked = (rank < n[..., None]) & fits[..., None]
        log_p = passes.log_p(masked.flatten(2)).unflatten(2, (-1, size))
        parts.append((log_p * counted).sum(dim=-1) / -n)
    return torch.cat(parts).unflatten(0, (num_draws, size)).sum(dim=1)


def any_order(passes: Passes, free: Tensor) -> Tensor:
    """-log p of the first-hitting sampler, whose every order is equally likely, (B, K) nats.

    By dynamic programming: F(S + i) += F(S) p(x_i given S) / (number of masks left at S), over the
    sets S of revealed tokens, here by the masks that are left, as numbers of L bits.
    """
    size, device = free.shape[-1], free.device
    log_p = torch.cat([part for _, _, part in over_subsets(passes, free)])  # (2^L - 1, B, K, L)
    bit = 1 << torch.arange(size, device=device)
    log_f = torch.full((2**size, *free.shape[:2]), -torch.inf, dtype=torch.float64, device=device)
    log_f.scatter_(0, (free * bit).sum(dim=-1)[None], 0.0)  # at first all that is free is masked
    for masks in range(2**size - 1, 0, -1):
        revealed = [i for i in range(size) if masks >> i & 1]
        left = [masks ^ (1 << i) for i in revealed]
        step = log_f[masks] + log_p[masks - 1][..., revealed].movedim(-1, 0)
        step = step - torch.tensor(len(revealed), dtype=torch.float64).log()
        log_f[left] = torch.logaddexp(log_f[left], step)
    return -log_f[0]
