"""How fast a training is."""

import time

import lightning as L
from torch import Tensor


class Pace:
    """Steps, tokens and seconds of a training since it was made, without those of pauses.

    Tokens are those of clean rows, B x N each batch, of all processes together.

    Attributes:
        num_steps: optimizer steps.
        num_tokens: tokens.
    """

    def __init__(self, trainer: L.Trainer):
        self._trainer = trainer
        self._first_step = trainer.global_step
        self.num_steps = self.num_tokens = 0
        self._began = time.perf_counter()  # unlike the clock it never goes back
        self._paused: float | None = None

    def count(self, batch: dict[str, Tensor]) -> bool:
        """Add a batch; returns whether an optimizer step ended with it."""
        self.num_tokens += batch["input_ids"].numel() * self._trainer.world_size
        before, self.num_steps = self.num_steps, self._trainer.global_step - self._first_step
        return self.num_steps != before

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Let the clock go on."""
        self._began += time.perf_counter() - self._paused
        self._paused = None

    @property
    def seconds(self) -> float:
        """Seconds that were no pause."""
        now = time.perf_counter() if self._paused is None else self._paused
        return now - self._began


class Throughput(L.Callback):
    """Logs `trainer/steps_per_second` and `trainer/tokens_per_second` of all processes together.

    Means since the last time they were logged, every `trainer.log_every_n_steps` steps; the time
    spent on validation is left out, and logged as `trainer/validation_seconds`.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace = Pace(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        is_step = self._pace.count(batch)
        if not is_step or trainer.global_step % trainer.log_every_n_steps:
            return
        seconds = self._pace.seconds
        rates = {
            "trainer/steps_per_second": self._pace.num_steps / seconds,
            "trainer/tokens_per_second": self._pace.num_tokens / seconds,
        }
        pl_module.log_dict(rates, rank_zero_only=True, batch_size=1)
        self._pace = Pace(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_began = time.perf_counter()
            self._pace.pause()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            seconds = time.perf_counter() - self._validation_began
            pl_module.log("trainer/validation_seconds", seconds, rank_zero_only=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._pace.resume()
