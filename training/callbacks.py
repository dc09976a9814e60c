"""Callbacks of a training run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from models.ema import ExponentialMovingAverage


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
        self.ema.shadow = [shadow.to(pl_module.device) for shadow in self.ema.shadow]

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
        else:  # written with training.ema=0: the average starts from its weights
            self.ema = ExponentialMovingAverage(pl_module.parameters(), decay=self.decay)

    def _swap(self, pl_module: L.LightningModule, *, to_average: bool) -> None:
        if self.ema is not None and self._is_swapped != to_average:
            self.ema.swap(pl_module.parameters())
            self._is_swapped = to_average


class LastCheckpoint(Checkpoint):
    """Writes a checkpoint where training ends between two regular ones.

    At the last batch rather than after it: Lightning closes the epoch then, and a run that resumes
    would begin the next one instead of going on with this one.

    Args:
        path: the file.
    """

    def __init__(self, path: str):
        self.path = path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        is_last_step = 0 <= trainer.max_steps <= trainer.global_step
        if is_last_step or trainer.should_stop:  # the latter by trainer.max_time
            trainer.save_checkpoint(self.path)
