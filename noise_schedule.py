"""Noise schedules: how likely a token is masked at time t, and the weight of its loss.

A schedule is a masking probability p(t) (`move_chance`, 1 - alpha_t in the paper) on t in [0, 1]
with p(1) = 1. The weight of the NELBO is alpha'_t / (1 - alpha_t) = -d/dt log p(t)
(`loss_scaling`, paper eq. 8); for `loglinear`, p = t, it is -1/t.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The original's floor: of t in training, of p where a power of t gets close to zero, and of 1 - p
# where a total noise -log(1 - p) would diverge. Published likelihoods depend on it.
EPS = 1e-3


@dataclass(frozen=True)
class NoiseValues:
    """loss_scaling and move_chance, each of t's shape."""

    loss_scaling: Tensor
    move_chance: Tensor

    def repeat_interleave(self, block_size: int) -> "NoiseValues":
        """Values per block (B, K) as values per token (B, K L)."""
        repeats = (value.repeat_interleave(block_size, dim=1) for value in vars(self).values())
        return NoiseValues(*repeats)

    @classmethod
    def cat(cls, parts: Sequence["NoiseValues"]) -> "NoiseValues":
        """Several batches as one."""
        rows = ([getattr(part, name) for part in parts] for name in vars(parts[0]))
        return cls(*map(torch.cat, rows))


class Noise(ABC):
    """A masking schedule. Called with t in (0, 1], any shape, it returns `NoiseValues`."""

    @abstractmethod
    def move_chance(self, t: Tensor) -> Tensor:
        """p(t)."""

    @abstractmethod
    def move_chance_rate(self, t: Tensor) -> Tensor:
        """dp/dt."""

    def __call__(self, t: Tensor) -> NoiseValues:
        move_chance = self.move_chance(t)
        return NoiseValues(-self.move_chance_rate(t) / move_chance, move_chance)

    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t) = -log(1 - (1 - eps) p(t)), the noise level of the SEDD and MDLM papers."""
        return -torch.log1p(-(1 - EPS) * self.move_chance(t))

    def rate_noise(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        survival = 1 - (1 - EPS) * self.move_chance(t)
        return (1 - EPS) * self.move_chance_rate(t) / survival

    @property
    def sigma_max(self) -> float:
        """total_noise(1): p(1) = 1 for every schedule."""
        return -math.log(EPS)


class LogLinear(Noise):
    """p = t, so -log(1 - p) is linear in log(1 - t). The paper's default ("linear")."""

    def move_chance(self, t: Tensor) -> Tensor:
        return t

    def move_chance_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Power(Noise):
    """p = max(t^exponent, eps): `square` (2) and `square_root` (1/2)."""

    def __init__(self, exponent: float):
        self.exponent = exponent

    def move_chance(self, t: Tensor) -> Tensor:
        return (t**self.exponent).clamp(min=EPS)

    def move_chance_rate(self, t: Tensor) -> Tensor:
        # Not zero where p is floored: the original weighs those t as the power does.
        return self.exponent * t ** (self.exponent - 1)


class Log(Noise):
    """p = log2(1 + t)."""

    def move_chance(self, t: Tensor) -> Tensor:
        return torch.log1p(t) / math.log(2)

    def move_chance_rate(self, t: Tensor) -> Tensor:
        return 1 / (math.log(2) * (1 + t))


class Cosine(Noise):
    """p = 1 - (1 - eps) cos(pi t / 2)."""

    def move_chance(self, t: Tensor) -> Tensor:
        return 1 - (1 - EPS) * torch.cos(t * math.pi / 2)

    def move_chance_rate(self, t: Tensor) -> Tensor:
        return (1 - EPS) * torch.sin(t * math.pi / 2) * math.pi / 2

    def __call__(self, t: Tensor) -> NoiseValues:
        move_chance = self.move_chance(t)
        # The original floors the denominator a second time; its published figures carry it.
        return NoiseValues(-self.move_chance_rate(t) / (move_chance + EPS), move_chance)


SCHEDULES = {
    "loglinear": LogLinear(),
    "square": Power(2),
    "square_root": Power(0.5),
    "log": Log(),
    "cosine": Cosine(),
}


def get_noise(name: str) -> Noise:
    """The schedule called `name` (config key noise.type).

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"noise.type={name}: allowed are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
