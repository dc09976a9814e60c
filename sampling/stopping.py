"""When a row of text ends, or has to be drawn again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Progress

ENTROPY_WINDOW = 256  # tokens; the paper's rule looks at the last 256


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Looked at after each block, for each row alone.

    Args:
        eos_index: a row ends with the first such token that was sampled (given ones do not count,
            so BOS is no end where it is the same token); None goes on.
        min_entropy: nats; a row whose last 256 tokens have less has degenerated. None: never.
        is_var_length: a degenerate row is cut there; otherwise it is rejected.
    """

    eos_index: int | None = None
    min_entropy: float | None = None
    is_var_length: bool = False

    def apply(self, progress: Progress, *, end: int) -> None:
        """Stop the rows that end within the first `end` tokens."""
        if self.eos_index is not None:
            is_eos = (progress.x[:, :end] == self.eos_index) & ~progress.given[:, :end]
            lengths = is_eos.int().argmax(dim=1) + 1
            progress.stop(is_eos.any(dim=1), lengths=lengths, is_rejection=False)
        # Behind a limit masks are left, which are no text to judge.
        progress.stop_at_limits(end - 1)
        if self.min_entropy is not None and end >= ENTROPY_WINDOW:
            recent = progress.x[:, end - ENTROPY_WINDOW : end]
            is_degenerate = histogram_entropy(recent) < self.min_entropy
            progress.stop(is_degenerate, lengths=end, is_rejection=not self.is_var_length)
        progress.stop_at_limits(end)


def histogram_entropy(tokens: Tensor) -> Tensor:
    """Entropy in nats of each row's histogram of tokens, (B, n) -> (B,) float32.

    The sum over tokens of -p log p is the mean over positions of -log p(token there).
    """
    counts = (tokens[:, :, None] == tokens[:, None, :]).sum(dim=2)
    return -torch.log(counts / tokens.shape[1]).mean(dim=1)
