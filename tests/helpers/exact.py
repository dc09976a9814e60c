"""The exact distributions of the samplers, by enumeration.

A `Table` says p of each token at a position of a text that may hold masks, as `TableDenoiser` and
`NetworkTable` do.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch

from models.denoiser import Denoiser
from models.masks import AttentionPattern
from tests.helpers.toys import Distribution, with_token

Text = tuple[int, ...]


class Table(Protocol):
    mask: int

    def probs(self, text: Text, position: int) -> Sequence[float]:
        """p of the tokens 0, 1, ... at a position of the text."""
        ...


class NetworkTable:
    """The predictions of a network, kept: p of every token but the mask, which is the last id."""

    def __init__(self, denoise: Denoiser, *, pattern: AttentionPattern):
        self.mask = denoise.mask_index

        @cache
        def all_probs(text: Text) -> list[list[float]]:
            with torch.no_grad():
                log_p = denoise(torch.tensor([text]), pattern=pattern)[0, :, : self.mask]
            return log_p.double().softmax(dim=-1).tolist()

        self._all_probs = all_probs

    def probs(self, text: Text, position: int) -> Sequence[float]:
        return self._all_probs(text)[position]


def first_hitting(table: Table, text: Text) -> Distribution:
    """One masked position, chosen uniformly, is revealed; and so on."""
    found: Distribution = {text: 1.0}
    for num_left in range(text.count(table.mask), 0, -1):
        longer: Distribution = defaultdict(float)
        for partial, p in found.items():
            for position in (i for i, token in enumerate(partial) if token == table.mask):
                for token, q in enumerate(table.probs(partial, position)):
                    longer[with_token(partial, position, token)] += p * q / num_left
        found = longer
    return found


def ancestral(table: Table, text: Text, *, num_steps: int) -> Distribution:
    """Step from t to s: each mask is revealed with probability 1 - s/t, tokens independent."""
    found: Distribution = {text: 1.0}
    for step in range(num_steps):
        stays = (num_steps - step - 1) / (num_steps - step)
        longer: Distribution = defaultdict(float)
        for partial, p in found.items():
            masked = [i for i, token in enumerate(partial) if token == table.mask]
            choices = []  # of each mask: (token, probability), or it stays
            for position in masked:
                probs = table.probs(partial, position)
                shown = [(token, (1 - stays) * q) for token, q in enumerate(probs)]
                choices.append([(table.mask, stays), *shown] if stays else shown)
            for picks in itertools.product(*choices):
                q, end = p, list(partial)
                for position, (token, chance) in zip(masked, picks, strict=True):
                    q, end[position] = q * chance, token
                longer[tuple(end)] += q
        found = longer
    return found


def autoregressive(table: Table, text: Text) -> Distribution:
    """Each mask is drawn given the tokens before it, whatever follows."""
    found: Distribution = {text: 1.0}
    for position in (i for i, token in enumerate(text) if token == table.mask):
        longer: Distribution = defaultdict(float)
        for partial, p in found.items():
            for token, q in enumerate(table.probs(partial[:position], position - 1)):
                longer[with_token(partial, position, token)] += p * q
        found = longer
    return found


def complete(fill, table: Table, canvas: Text, *, block_size: int, **settings) -> Distribution:
    """The distribution when `fill` completes a canvas block after block, given tokens seen.

    Args:
        fill: `first_hitting` or `ancestral`.
        table: sees the text up to the end of the block.
        canvas: given tokens and masks.
        block_size: L.
        settings: of `fill`.
    """
    found: Distribution = {(): 1.0}
    for start in range(0, len(canvas), block_size):
        block = canvas[start : start + block_size]
        longer: Distribution = defaultdict(float)
        for text, p in found.items():
            for filled, q in fill(table, text + block, **settings).items():
                longer[filled] += p * q
        found = longer
    return found


def given(joint: Distribution, canvas: Text, *, mask: int) -> Distribution:
    """The joint distribution of texts given the tokens of a canvas."""
    kept = {
        text: p
        for text, p in joint.items()
        if all(c in (token, mask) for token, c in zip(text, canvas, strict=True))
    }
    total = sum(kept.values())
    return {text: p / total for text, p in kept.items()}


def total_variation(one: Distribution, other: Distribution) -> float:
    """Half the sum of the differences of two distributions."""
    return sum(abs(one.get(t, 0.0) - other.get(t, 0.0)) for t in one.keys() | other.keys()) / 2


def frequencies(tokens: torch.Tensor) -> Distribution:
    """Shares of the texts (B, N) that were drawn."""
    unique, counts = tokens.unique(dim=0, return_counts=True)
    shares = (counts / len(tokens)).tolist()
    return dict(zip(map(tuple, unique.tolist()), shares, strict=True))
