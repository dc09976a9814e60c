"""Denoisers whose every distribution can be written down."""

import itertools
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from models.masks import AttentionPattern
from sampling.base import blank_canvas
from sampling.semi_ar import SemiAutoregressiveSampler
from tests.helpers.references import p_value

NUM_TOKENS, MASK, V = 3, 3, 4  # tokens 0, 1, 2 and the mask
BOS = 0
NUM_DRAWS = 20_000
Distribution = dict[tuple[int, ...], float]


class TableDenoiser:
    """Random log p (.., V) for every possible text of up to four tokens; counts its calls.

    What it predicts at a position depends on every token it is given, so a sampler that shows it a
    wrong text, or draws in a wrong order, has another distribution.
    """

    mask = MASK

    def __init__(self, *, seed: int = 0, at_position: Callable[[int], int] | None = None):
        generator = torch.Generator().manual_seed(seed)
        self.tables = {}
        for length in range(1, 5):
            logits = 1.5 * torch.randn(V**length, length, V, generator=generator).double()
            if at_position is not None:  # one token has all the mass
                for position in range(length):
                    logits[:, position, at_position(position)] = 1e4
            logits[..., MASK] = -1e6
            self.tables[length] = logits.log_softmax(dim=-1)
        self.patterns: set[AttentionPattern] = set()
        self.num_calls = 0

    def log_p(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        powers = V ** torch.arange(x.shape[1])
        return self.tables[x.shape[1]][(x * powers).sum(dim=1)]

    def __call__(self, x, sigma=None, *, pattern, kv_cache=None, at=None):
        self.num_calls += 1
        self.patterns.add(pattern)
        log_p = self.log_p(x)
        return log_p if at is None else log_p[at]

    def probs(self, text: tuple[int, ...], position: int) -> list[float]:
        """p of tokens 0, 1, 2 at a position."""
        return self.log_p(torch.tensor([text]))[0, position, :NUM_TOKENS].exp().tolist()


def canvas(batch_size: int, length: int) -> Tensor:
    """BOS and masks."""
    return blank_canvas(
        batch_size, length, bos_index=BOS, mask_index=MASK, device=torch.device("cpu")
    )


def texts(length: int) -> list[tuple[int, ...]]:
    """Every text that begins with BOS."""
    return [(BOS, *rest) for rest in itertools.product(range(NUM_TOKENS), repeat=length - 1)]


def with_token(text: tuple[int, ...], position: int, token: int) -> tuple[int, ...]:
    return (*text[:position], token, *text[position + 1 :])


def block_by_block(
    fill: Callable[[tuple[int, ...]], Distribution], *, length: int, block_size: int
) -> Distribution:
    """The distribution of texts when `fill` completes one block of masks after another."""
    found: Distribution = {(BOS,): 1.0}
    while len(next(iter(found))) < length:
        start = len(next(iter(found)))
        masks = (MASK,) * (block_size - start % block_size)
        longer: Distribution = defaultdict(float)
        for text, p in found.items():
            for filled, q in fill(text + masks).items():
                longer[filled] += p * q
        found = longer
    return found


def fit(tokens: Tensor, expected: Distribution) -> float:
    """The p-value of drawn texts (B, N) under a distribution; 0 for an impossible text."""
    order = texts(tokens.shape[1])
    index = {text: i for i, text in enumerate(order)}
    counts = torch.zeros(len(order))
    for text in map(tuple, tokens.tolist()):
        if text not in index:
            return 0.0
        counts[index[text]] += 1
    probs = torch.tensor([expected.get(text, 0.0) for text in order])
    return p_value(counts, probs * len(tokens))


def semi(block_size: int, **changes) -> SemiAutoregressiveSampler:
    settings = {"pad_index": BOS, "mask_index": MASK, "pattern": AttentionPattern.BLOCK_CAUSAL}
    return SemiAutoregressiveSampler(block_size=block_size, **(settings | changes))
