"""From log probabilities to tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS_RULES = ("paper", "standard")
# Tokens among which the nucleus is looked for first, then four times as many, and so on: to sort
# 50,000 numbers takes as long as the network takes for a block.
CANDIDATES = 256


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a token is drawn from the network's distribution.

    Args:
        temperature: the distribution is raised to 1 / temperature; 0 takes the most probable.
        top_k: keep this many of the most probable tokens; None keeps all.
        nucleus_p: keep the most probable tokens up to this cumulative probability, in (0, 1].
        nucleus_rule: `paper` drops the token that crosses p (the published samples are made so),
            `standard` keeps it. The most probable token always stays.
    """

    temperature: float = 1.0
    top_k: int | None = None
    nucleus_p: float = 1.0
    nucleus_rule: str = "paper"

    def probs(self, log_p: Tensor) -> Tensor:
        """Probabilities (..., V) in float64 from log probabilities (..., V)."""
        log_p = log_p.double()
        if self.temperature == 0:
            best = log_p.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(log_p).scatter(-1, best, 1.0)
        if self.temperature != 1:
            log_p = log_p / self.temperature
        probs = log_p.softmax(dim=-1)
        if self.top_k is not None:
            probs = top_k(probs, k=self.top_k)
        return nucleus(probs, p=self.nucleus_p, keeps_crossing=self.nucleus_rule == "standard")

    def draw(self, log_p: Tensor, *, u: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each row of (n, V) and uniform number of (n,).

        Returns:
            Tokens (n,) int64 and the probability that each was drawn with, (n,).
        """
        probs = self.probs(log_p)
        tokens = categorical(probs, u=u)
        return tokens, probs.gather(-1, tokens[..., None]).squeeze(-1)


def top_k(probs: Tensor, *, k: int) -> Tensor:
    """Keep the k most probable tokens of (..., V); ties at the border stay."""
    if k >= probs.shape[-1]:
        return probs
    border = probs.topk(k, dim=-1).values[..., -1:]
    kept = probs * (probs >= border)
    return kept / kept.sum(dim=-1, keepdim=True)


def nucleus(probs: Tensor, *, p: float, keeps_crossing: bool = False) -> Tensor:
    """Keep the most probable tokens whose cumulative probability is at most p.

    Args:
        probs: (..., V).
        p: in (0, 1]; 1 keeps everything.
        keeps_crossing: also keep the token that crosses p. The most probable one always stays.

    Returns:
        Renormalised probabilities (..., V).
    """
    if p >= 1.0:
        return probs
    flat = probs.reshape(-1, probs.shape[-1])
    kept, num = torch.zeros_like(flat), CANDIDATES
    rows = torch.arange(len(flat), device=flat.device)  # whose nucleus is not known yet
    while len(rows):
        ordered, order = _most_probable(flat if len(rows) == len(flat) else flat[rows], num=num)
        cumulative = ordered.cumsum(dim=-1)
        keep = (cumulative - ordered < p) if keeps_crossing else (cumulative <= p)
        keep[:, 0] = True
        kept[rows[:, None], order] = ordered * keep
        ends_later = keep[:, -1] & (num < flat.shape[-1])
        rows, num = rows[ends_later], 4 * num
    return (kept / kept.sum(dim=-1, keepdim=True)).view_as(probs)


def _most_probable(probs: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
    """Probabilities and tokens in descending order, `num` of each row (n, V) or all."""
    if num < probs.shape[-1]:
        return probs.topk(num, dim=-1)
    return probs.sort(dim=-1, descending=True, stable=True)


def categorical(probs: Tensor, *, u: Tensor) -> Tensor:
    """Inverse-CDF draws: for each row of unnormalised probabilities (..., V) and u (...), a token.

    In float64: float32 sums would distort the tail of a large vocabulary. One uniform number per
    token, instead of V, is what lets every row have its own generator cheaply.
    """
    cdf = probs.double().cumsum(dim=-1)
    total = cdf[..., -1:]
    # Rounding must not carry u * total up to the total: behind it is no token.
    target = torch.minimum(u[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)
