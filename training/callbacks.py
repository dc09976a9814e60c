"""Callbacks of a training run."""

from typing import Any

import lightning as L

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
