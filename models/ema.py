"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .sharding import local, placed_like, whole

# Weights averaged at a time: few operations for all of them, and a bounded copy of some.
_GROUP = 2**22


class ExponentialMovingAverage:
    """shadow <- d * shadow + (1 - d) * parameter, with d = min(decay, (1 + n) / (10 + n)).

    The shadow is positional: entry i belongs to the i-th parameter that requires a gradient. That,
    and the three keys of `state_dict`, is the original's file format. Where parameters are sharded,
    so is the shadow, and each process averages its own pieces; files hold whole tensors.

    Args:
        parameters: the parameters to follow; their present values start the average.
        decay: the asymptotic decay, in [0, 1).
    """

    def __init__(self, parameters: Iterable[Tensor], *, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"training.ema={decay}: must lie in [0, 1)")
        self.decay = decay
        self.num_updates = 0
        self.shadow = [p.detach().clone() for p in parameters if p.requires_grad]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Move the shadow one step towards the parameters (call after each optimizer step)."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        followed = [local(p.detach()) for p in parameters if p.requires_grad]
        averages = [local(s) for s in self.shadow]
        for current, shadow in zip(_groups(followed), _groups(averages), strict=True):
            # Not lerp: its float32 rounding is another one than the original's.
            difference = torch._foreach_sub(shadow, current)
            torch._foreach_mul_(difference, 1.0 - decay)
            torch._foreach_sub_(shadow, difference)

    def place_like(self, parameters: Iterable[Tensor]) -> None:
        """Move the shadow to where the parameters are by now, sharded as they are."""
        followed = (p for p in parameters if p.requires_grad)
        self.shadow = [placed_like(s, p) for s, p in zip(self.shadow, followed, strict=True)]

    @torch.no_grad()
    def swap(self, parameters: Iterable[Tensor]) -> None:
        """Exchange shadow and parameters in place; calling it twice restores both."""
        for shadow, parameter in zip(
            self.shadow, (p for p in parameters if p.requires_grad), strict=True
        ):
            mine, theirs = local(shadow), local(parameter)
            held = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """The original's layout: decay, num_updates and the positional list shadow_params.

        Of sharded parameters only the first process gets the tensors; all must call this.
        """
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": [whole(shadow) for shadow in self.shadow],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the tensors are whole ones on every process.

        Raises:
            ValueError: if the number of tensors or a shape does not fit the parameters followed.
        """
        loaded = state["shadow_params"]
        shapes = [tuple(t.shape) for t in loaded]
        expected = [tuple(t.shape) for t in self.shadow]
        if shapes != expected:
            raise ValueError(
                f"ema.shadow_params: {len(shapes)} tensors of shapes {shapes[:3]}..., the network "
                f"has {len(expected)} parameters of shapes {expected[:3]}..."
            )
        for shadow, tensor in zip(self.shadow, loaded, strict=True):
            local(shadow).copy_(local(placed_like(tensor, shadow)))
        self.decay, self.num_updates = state["decay"], state["num_updates"]


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """All elements as flat views, in lists of at most `_GROUP` elements."""
    group, size = [], 0
    for piece in (piece for tensor in tensors for piece in tensor.view(-1).split(_GROUP)):
        if size + len(piece) > _GROUP:
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece)
    yield group
