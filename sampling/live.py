"""What the terminal shows while rows are sampled: how far it is, and the rows themselves."""

import functools
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from .prompts import CanvasRow
from .trace import Decode, token_texts

SECONDS_PER_FRAME = 0.1
MAX_ROWS = 4  # shown at once
TOKENS_SHOWN = 240  # of a longer row, those around the newest
MASK = "░░"
# Colours of tokens by age, the newest first; what is older keeps the last one.
AGES = ("bold black on bright_yellow", "yellow", "green", "cyan", "blue", "magenta")
GIVEN, HIDDEN = "bold", "bright_black"


class TokensPerSecond(ProgressColumn):
    """The speed of a task whose unit is a token, over the last seconds."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        known = "-" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
        return Text(f"{known} tokens/s", style="progress.data.speed")


class SamplingDisplay:
    """A progress bar in tokens and, if asked for, the rows of the batch as they are filled.

        with SamplingDisplay(rows, mask_index=mask_index, decode=tokenizer.decode) as display:
            output = model.generate(canvas, on_step=display.begin(batch))

    Frames are drawn at most every `SECONDS_PER_FRAME`, so that a fast sampler is not held up; the
    tokens of the passes in between appear together.

    Args:
        rows: all rows that will be sampled; they tell how many tokens there are to come.
        mask_index: id of the mask token.
        decode: token ids to text.
        shows_rows: show the first rows of the batch too.
        console: where to; only a terminal gets frames.
        is_quiet: show nothing at all.
    """

    def __init__(
        self,
        rows: Sequence[CanvasRow],
        *,
        mask_index: int,
        decode: Decode,
        shows_rows: bool = False,
        console: Console | None = None,
        is_quiet: bool = False,
    ):
        self.console = console or Console()
        self._mask_index, self._shows_rows = mask_index, shows_rows
        self._decode = functools.lru_cache(maxsize=50_000)(
            lambda ids: decode([i for i in ids if i != mask_index])
        )
        self._bar = Progress(
            TextColumn("Sampling"), BarColumn(), TaskProgressColumn(), TokensPerSecond(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=is_quiet,
        )  # fmt: skip
        total = sum(self._num_masks(row) for row in rows)
        self._task = self._bar.add_task("sampling", total=total)
        self._view = Live(console=self.console, refresh_per_second=4)
        self._is_shown = self.console.is_terminal and not is_quiet
        self._num_done, self._num_in_batch = 0, 0  # masks of the batches before, and of this one

    def __enter__(self) -> "SamplingDisplay":
        if self._is_shown:
            self._view.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_batch()
        if self._is_shown:
            self._view.stop()

    def begin(self, batch: Sequence[CanvasRow]) -> Callable[[Tensor], None] | None:
        """The next batch.

        Returns:
            What the sampler is to call after each pass; None where there is nothing to show.
        """
        self._finish_batch()
        self._num_in_batch = sum(self._num_masks(row) for row in batch)
        self._limits = torch.tensor([row.limit for row in batch])
        self._given = torch.zeros(len(batch), int(self._limits.max()), dtype=torch.bool)
        for row, mask in zip(batch, self._given, strict=True):
            mask[: len(row.tokens)] = torch.tensor(row.tokens) != self._mask_index
        self._changed = torch.zeros_like(self._given, dtype=torch.int64)
        self._num_frames, self._drawn_at = 0, 0.0
        return self._on_step if self._is_shown else None

    def _finish_batch(self) -> None:
        self._num_done, self._num_in_batch = self._num_done + self._num_in_batch, 0
        self._bar.update(self._task, completed=self._num_done)
        if self._is_shown:
            self._view.update(self._bar, refresh=True)

    def _num_masks(self, row: CanvasRow) -> int:
        return row.limit - sum(token != self._mask_index for token in row.tokens)

    def _on_step(self, tokens: Tensor) -> None:
        """Draws a frame of the tokens (B, N) if one is due."""
        now = time.monotonic()
        if now - self._drawn_at < SECONDS_PER_FRAME:
            return
        self._drawn_at = now
        if len(tokens) != len(self._given):  # rows that are drawn again, and not which
            self._given = self._given.all(dim=0).expand(len(tokens), -1)
            self._limits = self._limits.max().expand(len(tokens))
            self._changed = torch.zeros(self._given.shape, dtype=torch.int64)
        tokens = tokens[:, : self._given.shape[1]].cpu()
        is_text = torch.arange(tokens.shape[1]) < self._limits[:, None]
        is_mask = (tokens == self._mask_index) & is_text
        self._num_frames += 1
        self._changed.masked_fill_(is_mask, 0)
        is_new = ~is_mask & ~self._given & is_text & (self._changed == 0)
        self._changed.masked_fill_(is_new, self._num_frames)
        in_batch = max(0, self._num_in_batch - int(is_mask.sum()))
        self._bar.update(self._task, completed=self._num_done + in_batch)
        if self._shows_rows:
            panels = [self._panel(row, tokens[row]) for row in range(min(MAX_ROWS, len(tokens)))]
            self._view.update(Group(self._bar, *panels), refresh=True)

    def _panel(self, row: int, tokens: Tensor) -> Panel:
        """A row (N,), its tokens coloured by age; of a long one the part that is being filled."""
        limit = int(self._limits[row])
        newest = int(self._changed[row].argmax())
        start = max(0, min(newest - TOKENS_SHOWN // 2, limit - TOKENS_SHOWN))
        end = min(limit, start + TOKENS_SHOWN)
        ids = tuple(tokens[start:end].tolist())
        text = Text(overflow="fold")
        for i, word in enumerate(token_texts(ids, self._decode)):
            shown = MASK if ids[i] == self._mask_index else word
            text.append(shown, style=self._style(row, start + i))
        where = f"tokens {start + 1} to {end} of {limit}"
        return Panel(text, title=where, title_align="left", border_style="dim")

    def _style(self, row: int, position: int) -> str:
        if self._given[row, position]:
            return GIVEN
        changed = int(self._changed[row, position])
        if changed == 0:
            return HIDDEN
        return AGES[min(self._num_frames - changed, len(AGES) - 1)]
