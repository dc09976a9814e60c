"""Ends a training whose loss is no number any more, and keeps the batch for study."""

from typing import Any

import fsspec
import lightning as L
import torch
from torch import Tensor


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite; the message says where the batch is."""


class NanGuard(L.Callback):
    """Stops all processes when the loss of any is NaN or infinite.

    Looking at a loss makes the CPU wait for the GPU, so no step does. A flag on the device goes up
    at the first loss that is not finite, and the batch of that step is copied aside, on the device
    too. The flag is read where the training waits anyway: every `trainer.log_every_n_steps` steps,
    and before a checkpoint is written, so that no checkpoint holds what came of such a loss.

    The batch before it is kept as well: where its gradient overflowed, it is the culprit. Files
    are `nonfinite_rank<r>.pt` and hold tensors and plain containers.

    Args:
        directory: where the files go, any place fsspec reaches.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self._kept: dict[str, Tensor] = {}
        self._previous: dict[str, Tensor] = {}
        self._found: Tensor | None = None
        self._last_step = 0
        self._error: NonFiniteLossError | None = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        self._watch(outputs["loss"], batch, number=trainer.fit_loop.total_batch_idx)
        step = trainer.global_step
        if step != self._last_step and step % trainer.log_every_n_steps == 0:
            self._check(trainer, pl_module)
        self._last_step = step

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer, pl_module)

    def _watch(self, loss: Tensor, batch: dict[str, Tensor], *, number: int) -> None:
        """Puts the batch aside if its loss is the first that is not finite; waits for nothing."""
        if self._found is None:
            self._found = torch.zeros_like(loss, dtype=torch.bool)
        is_first = ~torch.isfinite(loss) & ~self._found
        now = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        seen = {f"previous_{name}": value for name, value in (self._previous or now).items()}
        seen |= now | {"loss": loss, "batch_number": torch.full_like(loss, number, dtype=int)}
        # Batches of a training have one shape.
        self._kept = {
            name: torch.where(is_first, value, self._kept.get(name, value))
            for name, value in seen.items()
        }
        self._found |= is_first
        self._previous = now

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises on all processes alike if any has seen such a loss; a collective operation."""
        if self._error is not None:  # all that is saved on the way out
            raise self._error
        if self._found is None:
            return
        mine = torch.where(self._found, self._kept["batch_number"], -1)
        numbers = trainer.strategy.all_gather(mine).reshape(-1).tolist()
        found = {number: rank for rank, number in reversed(list(enumerate(numbers))) if number >= 0}
        if not found:
            return
        # After one bad step the weights of all are bad: what came later is a consequence.
        first = min(found)
        if numbers[trainer.global_rank] == first:
            self._write(trainer, pl_module)
        trainer.strategy.barrier()
        self._error = NonFiniteLossError(
            f"The loss became NaN or infinite at batch {first} of process {found[first]}, before "
            f"step {trainer.global_step}. The batch is in {self._path(found[first])}; no "
            "checkpoint was written since. The same command goes on from the last one; a lower "
            "optim.lr or trainer.gradient_clip_val may help"
        )
        raise self._error

    def _path(self, rank: int) -> str:
        return f"{self.directory}/nonfinite_rank{rank}.pt"

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        interval = pl_module.interval
        state = {name: value.cpu() for name, value in self._kept.items()}
        # The noise of a batch comes from these numbers, see `Diffusion.on_train_batch_start`.
        state |= {"seed": pl_module.seed, "rank": trainer.global_rank}
        state |= {"step": trainer.global_step, "interval": [interval.low, interval.high]}
        with fsspec.open(self._path(trainer.global_rank), "wb") as file:
            torch.save(state, file)
