"""Callbacks of a training run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from models.ema import ExponentialMovingAverage
from training.resume import validation_is_due


class EMACallback(L.Callback):
    """Follows the weights with their moving average, and validates with the average.

    The average is stored under the checkpoint's key `ema`.

    Args:
        decay: `training.ema`.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.ema: ExponentialMovingAverage | None = None
        self._step = 0
        self._is_swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.ema is None:
            self.ema = ExponentialMovingAverage(pl_module.parameters(), decay=self.decay)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ema.place_like(pl_module.parameters())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        if trainer.global_step != self._step:  # gradient accumulation: only where weights moved
            self._step = trainer.global_step
            self.ema.update(pl_module.parameters())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module, to_average=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module, to_average=False)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # An interrupted validation must not leave the average where the weights belong.
        self._swap(pl_module, to_average=False)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.ema is None:
            return
        if "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
            self.ema.decay = self.decay  # as typed, or as it was
        else:  # written with training.ema=0: the average starts from its weights
            self.ema = ExponentialMovingAverage(pl_module.parameters(), decay=self.decay)

    def _swap(self, pl_module: L.LightningModule, *, to_average: bool) -> None:
        if self.ema is not None and self._is_swapped != to_average:
            self.ema.swap(pl_module.parameters())
            self._is_swapped = to_average


class LastCheckpoint(Checkpoint):
    """Keeps last.ckpt up to date where regular checkpoints, every so many steps, leave a gap.

    - Where training ends between two of them. At the last batch: Lightning closes the epoch after
      it, and a run that resumes from a checkpoint of then begins a new epoch instead of going on.
    - Before a validation, which may take long and end with the job.
    - After it, with the clipped range that it found.

    Never within gradient accumulation, whose gradients are in no checkpoint.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        is_last_step = 0 <= trainer.max_steps <= trainer.global_step
        # should_stop: by trainer.max_time
        if is_last_step or trainer.should_stop or validation_is_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, is_newer=True)

    def save(self, trainer: L.Trainer, *, is_newer: bool = False) -> None:
        """Have last.ckpt written.

        Args:
            trainer: of the run.
            is_newer: there is more to save than what was saved at this step.
        """
        if trainer.fit_loop._should_accumulate():
            return
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.save_last:
                continue
            # Not public; saving past the callback would leave a last-v1.ckpt beside last.ckpt.
            if is_newer or callback._last_global_step_saved != trainer.global_step:
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
