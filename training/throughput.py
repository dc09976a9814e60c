"""How fast a training is."""

import time

import lightning as L
from torch import Tensor


class Throughput(L.Callback):
    """Logs `trainer/steps_per_second` and `trainer/tokens_per_second` of all processes together.

    Means since the last time they were logged, every `trainer.log_every_n_steps` steps; the time
    spent on validation is left out, and logged as `trainer/validation_seconds`. Tokens are those
    of clean rows, B x N each batch.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._logged_step = trainer.global_step
        self._num_tokens = 0
        self._began = time.perf_counter()  # unlike the clock it never goes back

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        self._num_tokens += batch["input_ids"].numel() * trainer.world_size
        is_new, self._step = self._step != trainer.global_step, trainer.global_step
        if not is_new or self._step % trainer.log_every_n_steps:
            return
        seconds = time.perf_counter() - self._began
        rates = {
            "trainer/steps_per_second": (self._step - self._logged_step) / seconds,
            "trainer/tokens_per_second": self._num_tokens / seconds,
        }
        pl_module.log_dict(rates, rank_zero_only=True, batch_size=1)
        self._logged_step, self._num_tokens = self._step, 0
        self._began = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            seconds = time.perf_counter() - self._paused
            pl_module.log("trainer/validation_seconds", seconds, rank_zero_only=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._began += time.perf_counter() - self._paused
