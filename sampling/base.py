"""What a sampler takes and returns.

Every sampler completes a canvas: a batch of rows in which some tokens are given (BOS, a prompt, the
surroundings of a gap) and the others are masks. The given tokens are never changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.denoiser import Denoiser

from .decoding import Guesses

# One generator for the batch, or one for each row: then a row does not depend on its neighbours.
Generators = torch.Generator | Sequence[torch.Generator] | None
# Rows and columns (n,) each. A boolean mask says the same, and a GPU would have to count it.
Positions = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """Completed rows.

    Attributes:
        tokens: (B, N) int64 without masks; what lies behind a row's length is padding.
        lengths: tokens of each row up to where it stopped, (B,).
        accepted: False where a row of fixed length degenerated and should be drawn again, (B,).
        num_forward_passes: network evaluations each row took part in (nfe), those of attempts that
            were rejected too, (B,).
        num_denoising_passes: those that revealed a token of the row, which is the paper's count:
            it leaves out passes that only store keys and values, (B,).
        revealed_at: the pass in which each token was revealed, from 1; 0 if it was given, (B, N).
        confidence: its probability at that moment, 1 if it was given, (B, N) float32.
    """

    tokens: Tensor
    lengths: Tensor
    accepted: Tensor
    num_forward_passes: Tensor
    num_denoising_passes: Tensor
    revealed_at: Tensor
    confidence: Tensor

    def first_rows(self, num_rows: int) -> "SamplerOutput":
        return SamplerOutput(**{name: value[:num_rows] for name, value in vars(self).items()})

    def replace_rows(self, rows: Sequence[int], other: "SamplerOutput") -> "SamplerOutput":
        """The same with the rows of these n numbers taken from an output of n rows."""
        replaced = {name: value.clone() for name, value in vars(self).items()}
        for name, value in replaced.items():
            value[rows] = getattr(other, name)
        return SamplerOutput(**replaced)


class Sampler(Protocol):
    """Completes canvases with a denoiser."""

    def sample(
        self,
        denoise: Denoiser,
        canvas: Tensor,
        *,
        limits: Tensor | None = None,
        generator: Generators = None,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> SamplerOutput:
        """Fill the masks of a canvas.

        Args:
            denoise: the network and its parameterization.
            canvas: (B, N) int64; position 0 is given.
            limits: where each row ends at the latest, (B,); what lies behind is not filled. None:
                N. Rows of different lengths share a canvas in this way.
            generator: on the canvas's device; a sequence of B makes the rows independent.
            on_step: called with the tokens (B, N) after each pass.
        """
        ...


def blank_canvas(
    batch_size: int, length: int, *, bos_index: int, mask_index: int, device: torch.device
) -> Tensor:
    """BOS and masks, (B, N) int64."""
    canvas = torch.full((batch_size, length), mask_index, device=device)
    canvas[:, 0] = bos_index
    return canvas


def uniform(shape: tuple[int, int], *, device: torch.device, generator: Generators) -> Tensor:
    """Uniform numbers on [0, 1), (B, n) float64, from each row's own generator if there are B."""
    if isinstance(generator, Sequence):
        rows = [
            torch.rand(shape[1], device=device, dtype=torch.float64, generator=g)
            for g in generator
        ]
        return torch.stack(rows)
    return torch.rand(shape, device=device, dtype=torch.float64, generator=generator)


class Progress:
    """The state of a batch of rows while a sampler fills them; each row has its own.

    Attributes:
        x: the tokens, (B, N).
        given: which of them were in the canvas, (B, N).
        is_active: rows that have not stopped, (B,).
        limits: where each row ends at the latest, (B,).
        guesses: how its nuclei are looked for, see `Decoding.may_guess`.
    """

    def __init__(
        self,
        canvas: Tensor,
        *,
        mask_index: int,
        limits: Tensor | None = None,
        on_step: Callable[[Tensor], None] | None = None,
    ):
        self.x = canvas.clone()
        self.given = canvas != mask_index
        self.is_active = torch.ones(len(canvas), dtype=torch.bool, device=canvas.device)
        self.guesses = Guesses()
        self._on_step = on_step
        zeros = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
        self._denoising_passes, self._storing_passes = zeros, zeros.clone()
        self.limits = zeros + canvas.shape[1] if limits is None else limits
        self._lengths = self.limits.clone()
        self._accepted = self.is_active.clone()
        self._revealed_at = torch.zeros_like(canvas)
        self._confidence = torch.ones_like(canvas, dtype=torch.float32)

    def reveal(
        self,
        at: Positions,
        *,
        tokens: Tensor,
        confidence: Tensor,
        start: int = 0,
        took_part: Tensor | None = None,
    ) -> None:
        """Write the tokens (n,) of one pass.

        Args:
            at: where; column 0 is position `start`.
            tokens, confidence: (n,).
            start: see `at`.
            took_part: rows whose pass it was, (B,); by default those with a new token.
        """
        rows, columns = at[0], at[1] + start
        if took_part is None:
            took_part = torch.zeros_like(self.is_active).index_fill_(0, rows, True)
        self._denoising_passes += took_part
        self.x[rows, columns] = tokens
        self._confidence[rows, columns] = confidence.float()
        self._revealed_at[rows, columns] = self._denoising_passes[rows]
        if self._on_step is not None:
            self._on_step(self.x)

    def saved(self) -> Callable[[], None]:
        """What takes back the passes that come now."""
        names = ("x", "_denoising_passes", "_revealed_at", "_confidence")
        kept = {name: getattr(self, name).clone() for name in names}
        return lambda: vars(self).update(kept)

    def to_fill(self, start: int, end: int) -> Tensor:
        """The masks in these columns that are to be revealed, (B, end - start) bool."""
        positions = torch.arange(start, end, device=self.x.device)
        is_open = ~self.given[:, start:end] & (self._revealed_at[:, start:end] == 0)
        return is_open & (positions < self.limits[:, None]) & self.is_active[:, None]

    def stop_at_limits(self, end: int) -> None:
        """End the rows whose limit lies within the first `end` tokens."""
        self.stop(self.limits <= end, lengths=self.limits, is_rejection=False)

    def count_storing_pass(self) -> None:
        self._storing_passes += self.is_active

    def stop(self, rows: Tensor, *, lengths: Tensor | int, is_rejection: bool) -> None:
        """End the rows of a boolean (B,) that are still active, at a length each."""
        rows = rows & self.is_active
        self._lengths = torch.where(rows, lengths, self._lengths)
        if is_rejection:
            self._accepted &= ~rows
        self.is_active &= ~rows

    def output(self, *, pad_index: int) -> SamplerOutput:
        """The result; what lies behind a row's length becomes padding."""
        positions = torch.arange(self.x.shape[1], device=self.x.device)
        is_text = positions < self._lengths[:, None]
        return SamplerOutput(
            tokens=self.x.where(is_text, pad_index),
            lengths=self._lengths,
            accepted=self._accepted,
            num_forward_passes=self._denoising_passes + self._storing_passes,
            num_denoising_passes=self._denoising_passes,
            revealed_at=self._revealed_at,
            confidence=self._confidence,
        )
