"""From log probabilities to tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUCLEUS_RULES = ("paper", "standard")
# Tokens among which the nucleus is looked for first, then four times as many, and so on: to sort
# 50,000 numbers takes as long as the network takes for a block.
CANDIDATES = 256
# A GPU would be waited for in each pass to learn who needs more. There so many are taken, and who
# needed more is known when the block is done.
GUESSED_CANDIDATES = 4096
# Probabilities held at once, in float64 and several forms of 0.13 GB.
MAX_NUMBERS = 2**24


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
        """Probabilities (..., V) in float64 from log probabilities (..., V), before the nucleus."""
        log_p = log_p.double()
        if self.temperature == 0:
            best = log_p.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(log_p).scatter(-1, best, 1.0)
        if self.temperature != 1:
            log_p = log_p / self.temperature
        probs = log_p.softmax(dim=-1)
        return probs if self.top_k is None else top_k(probs, k=self.top_k)

    def may_guess(self, device: torch.device) -> bool:
        """Whether draws are to be made among `GUESSED_CANDIDATES` first."""
        return self.nucleus_p < 1 and self.temperature != 0 and runs_ahead(device)

    def draw(
        self, log_p: Tensor, *, u: Tensor, is_wrong: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One token for each row of (n, V) and uniform number of (n,).

        Args:
            log_p, u: see above.
            is_wrong: a boolean () that becomes True where a nucleus has more than
                `GUESSED_CANDIDATES` tokens and the rest was left out; None: none is left out.

        Returns:
            Tokens (n,) int64 and the probability that each was drawn with, (n,).
        """
        size = max(1, MAX_NUMBERS // log_p.shape[-1])
        if len(log_p) > size:
            parts = zip(log_p.split(size), u.split(size), strict=True)
            drawn = [self.draw(some, u=v, is_wrong=is_wrong) for some, v in parts]
            tokens, confidence = zip(*drawn, strict=True)
            return torch.cat(tokens), torch.cat(confidence)
        probs, tokens = self.probs(log_p), None
        if self.nucleus_p < 1 and self.temperature != 0:
            rule = {"p": self.nucleus_p, "keeps_crossing": self.nucleus_rule == "standard"}
            if is_wrong is None:
                probs, tokens = nucleus_tokens(probs, **rule)
            else:
                probs, tokens, ends_later = _nucleus_among(probs, num=GUESSED_CANDIDATES, **rule)
                is_wrong |= ends_later.any()
            # In the order of the vocabulary, so that u means the same token as among all of it.
            tokens, by_id = tokens.sort(dim=-1, stable=True)
            probs = probs.gather(-1, by_id)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        drawn = categorical(probs, u=u)[:, None]
        confidence = probs.gather(-1, drawn)
        return (drawn if tokens is None else tokens.gather(-1, drawn))[:, 0], confidence[:, 0]


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
    weights, tokens = nucleus_tokens(flat, p=p, keeps_crossing=keeps_crossing)
    kept = torch.zeros_like(flat).scatter_add(-1, tokens, weights)
    return (kept / kept.sum(dim=-1, keepdim=True)).view_as(probs)


def nucleus_tokens(probs: Tensor, *, p: float, keeps_crossing: bool) -> tuple[Tensor, Tensor]:
    """The nucleus without the rest of the vocabulary; see `nucleus`.

    Args:
        probs: (n, V).
        p: below 1.
        keeps_crossing: see `nucleus`.

    Returns:
        Probabilities as they were, and ids, of K tokens of each row, (n, K). Tokens that are not
        in the nucleus have 0; rows of a smaller nucleus end in those, of any id.
    """
    num = CANDIDATES
    rows = torch.arange(len(probs), device=probs.device)  # whose nucleus is not known yet
    weights, tokens = probs.new_zeros(len(probs), 0), rows.new_zeros(len(probs), 0)
    while len(rows):
        is_all = len(rows) == len(probs)
        kept, order, ends_later = _nucleus_among(
            probs if is_all else probs[rows], num=num, p=p, keeps_crossing=keeps_crossing
        )
        more = (0, kept.shape[-1] - weights.shape[-1])
        weights, tokens = F.pad(weights, more), F.pad(tokens, more)
        weights[rows], tokens[rows] = kept, order
        rows, num = rows[ends_later], 4 * num
    return weights, tokens


def _nucleus_among(
    probs: Tensor, *, num: int, p: float, keeps_crossing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`nucleus_tokens` among the `num` most probable ones, and whether there are more, (n,)."""
    ordered, order = _most_probable(probs, num=num)
    cumulative = ordered.cumsum(dim=-1)
    keep = (cumulative - ordered < p) if keeps_crossing else (cumulative <= p)
    keep[:, :1] = True
    return ordered * keep, order, keep[:, -1] & (num < probs.shape[-1])


def _most_probable(probs: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
    """Probabilities and tokens in descending order, `num` of each row (n, V) or all."""
    if num < probs.shape[-1]:
        return probs.topk(num, dim=-1)
    return probs.sort(dim=-1, descending=True, stable=True)


def categorical(probs: Tensor, *, u: Tensor) -> Tensor:
    """Inverse-CDF draws: for each row of unnormalised probabilities (..., V) and u (...), a token.

    One distribution (V,) serves any number of u (n,).

    In float64: float32 sums would distort the tail of a large vocabulary, and float32 Gumbel noise
    would hardly ever draw it, which is a lower temperature (2409.02908). One uniform number per
    token, instead of V, is what lets every row have its own generator cheaply.
    """
    cdf = probs.double().cumsum(dim=-1)
    total = cdf[..., -1:]
    # Rounding must not carry u * total up to the total: behind it is no token.
    target = torch.minimum(u[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def runs_ahead(device: torch.device) -> bool:
    """Whether work is queued there, so that asking for a result costs more than the work."""
    return device.type == "cuda"


class Guesses:
    """Whether to guess in the next block: not where more than one in 16 had to be done again."""

    def __init__(self):
        self._num_blocks, self._num_wrong = 0, 0

    def next(self) -> bool:
        self._num_blocks += 1
        return self._num_wrong * 16 < self._num_blocks

    def was_wrong(self, is_wrong: Tensor) -> bool:
        """Waits for what the block's draws have found out."""
        self._num_wrong += (wrong := bool(is_wrong))
        return wrong
