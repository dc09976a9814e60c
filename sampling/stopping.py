"""When a row of text ends, or has to be drawn again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Progress

ENTROPY_WINDOW = 256  # tokens; the paper's rule looks at the last 256
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Looked at after each block, for each row alone.

    Args:
        eos_index: a row ends with the first such token that was sampled (given ones do not count,
            so BOS is no end where it is the same token); None goes on.
        min_entropy: nats; a row whose last 256 tokens have less has degenerated. None: never.
        is_var_length: a degenerate row is cut there; otherwise it is rejected.
        stop_strings: a row ends with the first token behind its prompt (the given tokens that it
            begins with) with which the text since then contains one of them.
        decode: that text from its tokens; `stop_strings` needs it.
    """

    eos_index: int | None = None
    min_entropy: float | None = None
    is_var_length: bool = False
    stop_strings: tuple[str, ...] = ()
    decode: Decode | None = None

    def __post_init__(self):
        """Raises ValueError: stop strings without a way to read tokens."""
        if self.stop_strings and self.decode is None:
            raise ValueError("sampling.stop_strings needs `decode`, the text of a list of tokens")

    def apply(self, progress: Progress, *, end: int) -> None:
        """Stop the rows that end within the first `end` tokens."""
        lengths = torch.full_like(progress.limits, end + 1)  # no end so far
        if self.eos_index is not None:
            is_eos = (progress.x[:, :end] == self.eos_index) & ~progress.given[:, :end]
            first = is_eos.int().argmax(dim=1) + 1
            lengths = torch.where(is_eos.any(dim=1), first, lengths)
        if self.stop_strings:
            lengths = torch.minimum(lengths, self._ends_of_strings(progress, end=end))
        progress.stop(lengths <= end, lengths=lengths, is_rejection=False)
        # Behind a limit masks are left, which are no text to judge.
        progress.stop_at_limits(end - 1)
        if self.min_entropy is not None and end >= ENTROPY_WINDOW:
            recent = progress.x[:, end - ENTROPY_WINDOW : end]
            is_degenerate = histogram_entropy(recent) < self.min_entropy
            progress.stop(is_degenerate, lengths=end, is_rejection=not self.is_var_length)
        progress.stop_at_limits(end)

    def _ends_of_strings(self, progress: Progress, *, end: int) -> Tensor:
        """Where each row contains a stop string for the first time, or end + 1, (B,)."""
        ends = torch.full_like(progress.limits, end + 1)
        starts = progress.given.long().cumprod(dim=1).sum(dim=1).tolist()
        for row in progress.is_active.nonzero()[:, 0].tolist():
            last = min(end, int(progress.limits[row]))
            tokens = progress.x[row, starts[row] : last].tolist()
            size = len(tokens)
            # The last look found nothing, so going back ends within what is new.
            while size > 0 and self._contains_string(tokens[:size]):
                size -= 1
            if size < len(tokens):
                ends[row] = starts[row] + size + 1
        return ends

    def _contains_string(self, tokens: list[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.stop_strings)


def histogram_entropy(tokens: Tensor) -> Tensor:
    """Entropy in nats of each row's histogram of tokens, (B, n) -> (B,) float32.

    The sum over tokens of -p log p is the mean over positions of -log p(token there).
    """
    counts = (tokens[:, :, None] == tokens[:, None, :]).sum(dim=2)
    return -torch.log(counts / tokens.shape[1]).mean(dim=1)
