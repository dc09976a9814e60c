"""Callbacks of a training run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from checkpointing.checkpoint_io import AtomicCheckpointIO
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


class RegularCheckpoint(ModelCheckpoint):
    """Lightning's; last.ckpt is another name of a file with the same content, where it can be.

    The same gigabytes were written twice, each time until the disk had them. When the file under
    the regular name is removed, last.ckpt keeps what was in it.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's class, under which older checkpoints hold what was kept."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Lightning's own, called where a regular checkpoint has just been saved."""
        last = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        if self._is_saved_apart_from(last, trainer) and self._link(trainer, last):
            self.last_model_path = last
        else:
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _is_saved_apart_from(self, last: str, trainer: L.Trainer) -> bool:
        """Whether there is a file of this step, and last.ckpt may be replaced by its name."""
        return (
            bool(self.save_last)
            and not self._enable_version_counter
            and self.last_model_path in ("", last)
            and self._last_checkpoint_saved not in ("", last)
            and self._last_global_step_saved == trainer.global_step
        )

    def _link(self, trainer: L.Trainer, last: str) -> bool:
        """A collective operation: saving is one, so all processes must know whether it is due."""
        files, is_linked = trainer.strategy.checkpoint_io, False
        if trainer.is_global_zero and isinstance(files, AtomicCheckpointIO):
            is_linked = files.link(self._last_checkpoint_saved, last)
        return trainer.strategy.broadcast(is_linked)


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
            if is_newer:
                callback._last_checkpoint_saved = ""  # no file holds it yet
            # Not public; saving past the callback would leave a last-v1.ckpt beside last.ckpt.
            if is_newer or callback._last_global_step_saved != trainer.global_step:
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
