"""The sampler of SSD-LM (arXiv 2210.17432): diffusion of one block at a time over a simplex.

A block of L tokens is L rows of V logits. Diffusion starts from Gaussian logits; each step asks
the network for clean logits, projects these to a token per position, written as logits of +-K,
and adds the noise of the next lower level. From the inside out: `alpha_bar`, `project`,
`add_noise`, `sample_block`, `sample_text`. None of them knows the network or files.

Letters: B rows, L block size, V vocabulary, T steps per block, K one-hot value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sampling.decoding import categorical, nucleus

SCHEDULE_OFFSET = 1e-4  # keeps the cosine away from its flat top at t = 0

# (x_t (B, L, V), context ids (B, C), t / T) -> logits (B, L, V)
SimplexNetwork = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class SSDSettings:
    """What shapes the distribution of the samples; the defaults are the paper's.

    Attributes:
        block_size: L, tokens that are denoised together.
        num_steps: T, forward passes per block.
        top_p: nucleus of the projection, in (0, 1].
        one_hot_value: K, the scale of projected logits and of the noise.
    """

    block_size: int = 25
    num_steps: int = 1000
    top_p: float = 0.95
    one_hot_value: float = 5.0


class Draws(Protocol):
    """Where randomness comes from: generators, or a recording of earlier draws."""

    def normal(self, shape: tuple[int, int, int]) -> Tensor:
        """Standard normals (B, L, V)."""
        ...

    def choose(self, probs: Tensor) -> Tensor:
        """One token (B, L) of each distribution in `probs` (B, L, V)."""
        ...


class RowDraws:
    """Draws each row from its own generator, so that a text does not depend on its batch."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    def normal(self, shape: tuple[int, int, int]) -> Tensor:
        """Standard normals (B, L, V) on the generators' device."""
        rows = [torch.randn(shape[1:], generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows)

    def choose(self, probs: Tensor) -> Tensor:
        """One token (B, L) of each distribution in `probs` (B, L, V)."""
        length = probs.shape[1]
        u = [
            torch.rand(length, generator=g, device=g.device, dtype=torch.float64)
            for g in self.generators
        ]
        return categorical(probs, u=torch.stack(u))


def alpha_bar(t: int, *, num_steps: int) -> float:
    """The share of signal after step t of T, 1 at t = 0.

    The cosine schedule f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi/2) with s = 1e-4.
    """

    def f(step: int) -> float:
        angle = (step / num_steps + SCHEDULE_OFFSET) / (1 + SCHEDULE_OFFSET) * math.pi / 2
        return math.cos(angle) ** 2

    return f(t) / f(0)


def project(logits: Tensor, *, settings: SSDSettings, draws: Draws) -> Tensor:
    """A token of the nucleus per position, as logits of +K at the token and -K elsewhere.

    The nucleus keeps the token that crosses `top_p`, unlike the samplers of Block Diffusion.

    Args:
        logits: the network's prediction, (B, L, V).

    Returns:
        (B, L, V) in the type of `logits`.
    """
    probs = logits.softmax(dim=-1)
    tokens = draws.choose(nucleus(probs, p=settings.top_p, keeps_crossing=True))  # (B, L)
    value = settings.one_hot_value
    return torch.full_like(logits, -value).scatter(-1, tokens[..., None], value)


def add_noise(clean: Tensor, noise: Tensor, *, t: int, settings: SSDSettings) -> Tensor:
    """x_t = sqrt(abar_t) clean + sqrt(1 - abar_t) K noise, all (B, L, V)."""
    signal = alpha_bar(t, num_steps=settings.num_steps)
    return math.sqrt(signal) * clean + math.sqrt(1 - signal) * settings.one_hot_value * noise


def sample_block(
    network: SimplexNetwork,
    context: Tensor,
    *,
    vocab_size: int,
    settings: SSDSettings,
    draws: Draws,
) -> Tensor:
    """Denoise one block in T forward passes.

    Args:
        network: predicts clean logits.
        context: ids of the text before the block, (B, C).
        vocab_size: V.

    Returns:
        Tokens (B, L): the most probable ones of the last prediction, which is not projected.
    """
    shape = (len(context), settings.block_size, vocab_size)
    x_t = settings.one_hot_value * draws.normal(shape)
    for t in range(settings.num_steps, 0, -1):
        logits = network(x_t, context, t / settings.num_steps).float()
        # At t = 1 nobody reads x_0. It is drawn all the same: every step takes the same draws.
        clean = project(logits, settings=settings, draws=draws)
        x_t = add_noise(clean, draws.normal(shape), t=t - 1, settings=settings)
    return logits.argmax(dim=-1)


@torch.no_grad()
def sample_text(
    network: SimplexNetwork,
    start: Tensor,
    *,
    length: int,
    vocab_size: int,
    settings: SSDSettings,
    draws: Draws,
) -> Tensor:
    """Sample texts block after block; a block sees the block before it and nothing earlier.

    Args:
        network: predicts clean logits.
        start: what the first block sees, (B, C): the token that begins a text.
        length: tokens per row, a multiple of the block size; `start` is not counted.
        vocab_size: V.

    Returns:
        Tokens (B, length), without `start`.

    Raises:
        ValueError: the length is not a positive multiple of the block size.
    """
    size = settings.block_size
    if length < size or length % size:
        nearest = sorted({max(length // size, 1) * size, (length // size + 1) * size})
        raise ValueError(
            f"length {length} is not a positive multiple of the block size {size}; the nearest "
            f"allowed: {' and '.join(map(str, nearest))}"
        )
    blocks = [start]
    for _ in range(length // size):
        context = blocks[-1]
        blocks.append(
            sample_block(network, context, vocab_size=vocab_size, settings=settings, draws=draws)
        )
    return torch.cat(blocks[1:], dim=1)
