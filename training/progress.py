"""How far a run is: a bar in a terminal, lines in the log of a batch job."""

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.callbacks import RichProgressBar, Timer
from torch import Tensor

from training.throughput import Pace
from utils import duration, get_logger, in_batch_job

logger = get_logger(__name__)

# The longest time without a line, in seconds; a batch that takes longer is waited for.
LONGEST_SILENCE = 300


def progress_callback() -> L.Callback:
    """What shows how far a run is: lines in a batch job, or else the bar."""
    return PlainProgress() if in_batch_job() else ProgressBar()


class ProgressBar(RichProgressBar):
    """Lightning's, with the step of the whole run instead of an end of epochs that has none.

    It is drawn on standard error. The loss is shown every `trainer.log_every_n_steps` steps, when
    it is read anyway: to read it is to wait for the GPU.
    """

    def __init__(self):
        super().__init__(console_kwargs={"stderr": True})
        self._loss: dict[str, float] = {}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        is_step = not trainer.fit_loop._should_accumulate()
        if is_step and trainer.global_step % trainer.log_every_n_steps == 0:
            self._loss = {"loss": float(trainer.callback_metrics["trainer/loss"])}
        super().on_train_batch_end(trainer, *args)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the logger's number of the run
        return {"step": f"{trainer.global_step}/{trainer.max_steps}"} | metrics | self._loss


class PlainProgress(LightningProgressBar):
    """Writes lines to the log, on the first process (a progress bar: or Lightning adds its own).

    - A line every `trainer.log_every_n_steps` optimizer steps, and after `LONGEST_SILENCE` without
      one. The loss is that of the last batch, the mean of all processes (after a silence that of
      the first, no step waits for the others); the learning rate that of the next step. Tokens per
      second are a mean since the line before and leave validations out, the time left does not.
    - A line after each validation, and one after each `LONGEST_SILENCE` in it. Batches are those of
      the first process.
    """

    def __init__(self):
        super().__init__()
        self._is_enabled = True

    def disable(self) -> None:
        """Be silent; Lightning calls it on all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._is_enabled = True

    # --- training --------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._began = self._last_step = self._last_line = time.perf_counter()
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
        if is_step:
            self._last_step = time.perf_counter()
        is_due = is_step and trainer.global_step % trainer.log_every_n_steps == 0
        if is_due or _is_long_ago(self._last_line):
            if self._is_enabled:
                logger.info("%s", self._step_line(trainer))
            self._pace = Pace(trainer)
            self._last_line = time.perf_counter()

    def _step_line(self, trainer: L.Trainer) -> str:
        total = _total_steps(trainer)
        facts = [
            f"loss {float(trainer.callback_metrics['trainer/loss']):.4f}",
            f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2e}",
            f"{self._pace.num_tokens / self._pace.seconds:,.0f} tokens/s",
        ]
        left = self._seconds_left(trainer, total)
        if left < math.inf:
            facts.append(f"{duration(left)} left")
        of_total = f" of {total:,}" if total < math.inf else ""
        return f"step {trainer.global_step:,}{of_total}: {', '.join(facts)}"

    def _seconds_left(self, trainer: L.Trainer, total: float) -> float:
        """As the pace since training (re)started has it, or `trainer.max_time` if that is sooner.

        Infinite where neither is known.
        """
        bounds = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
        num_steps = trainer.global_step - self._first_step
        if num_steps > 0:
            pace = (self._last_step - self._began) / num_steps
            since = time.perf_counter() - self._last_step
            bounds.append((total - trainer.global_step) * pace - since)
        return max(0.0, min((b for b in bounds if b is not None), default=math.inf))

    # --- validation ------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._num_batches = 0
        self._validation_began = self._validation_line = time.perf_counter()
        if _is_within_training(trainer):
            self._pace.pause()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._num_batches += 1
        is_heard = self._is_enabled and not trainer.sanity_checking
        if is_heard and _is_long_ago(self._validation_line):
            total = sum(trainer.num_val_batches)
            of_total = f" of {total:,}" if total < math.inf else ""
            done = f"{self._num_batches:,}{of_total} batches"
            logger.info("%s: %s", _validation_name(trainer), done)
            self._validation_line = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _is_within_training(trainer):
            self._pace.resume()
        if self._is_enabled and not trainer.sanity_checking:
            logger.info(
                "%s: %s batches in %s, val/nll %.4f",
                _validation_name(trainer),
                f"{self._num_batches:,}",
                duration(time.perf_counter() - self._validation_began),
                trainer.callback_metrics["val/nll"],
            )


class PassProgress(L.Callback):
    """Says how many forward passes an evaluation takes, and at times how many are done.

    Args:
        per_batch: passes over a batch.
        silence: seconds between lines.
    """

    def __init__(self, per_batch: int, *, silence: float = 30):
        self._per_batch, self._silence = per_batch, silence

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        num_batches = sum(trainer.num_val_batches)
        self._total, self._done = num_batches * self._per_batch, 0
        self._began = self._last_line = time.perf_counter()
        logger.info(
            "%s forward passes for each of %s batches, %s in all",
            f"{self._per_batch:,}", _count(num_batches), _count(self._total),
        )  # fmt: skip
        pl_module.on_pass = self.count

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.on_pass = None

    def count(self, num_passes: int) -> None:
        """Counts passes that are done."""
        self._done += num_passes
        now = time.perf_counter()
        if now - self._last_line >= self._silence:
            self._last_line = now
            left = (now - self._began) * (self._total / self._done - 1)
            ends = f", {duration(left)} left" if left < math.inf else ""
            logger.info("%s of %s passes%s", f"{self._done:,}", _count(self._total), ends)


def _count(number: float) -> str:
    """Of a stream nobody knows how long it is."""
    return f"{number:,}" if number < math.inf else "an unknown number"


def _is_long_ago(moment: float) -> bool:
    return time.perf_counter() - moment >= LONGEST_SILENCE


def _total_steps(trainer: L.Trainer) -> float:
    """By `trainer.max_steps` or `max_epochs`, whichever ends first; infinite where unknown."""
    total = trainer.estimated_stepping_batches
    return math.inf if total == -1 else total


def _is_within_training(trainer: L.Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _validation_name(trainer: L.Trainer) -> str:
    is_within = _is_within_training(trainer)
    return f"validation at step {trainer.global_step:,}" if is_within else "validation"


def quiet_known_noise() -> None:
    """Silence what Lightning and its libraries say in every run and nobody can act on.

    Of Lightning's lines those of its callbacks stay: they say what was saved, and why a training
    ended early. So do those of `trainer.profiler`.
    """
    for message in (
        "`isinstance\\(treespec",
        ".*set_vital.* is deprecated",
        "The '.*_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=message)
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
        # Through this one speaks every part of Lightning, on the first process.
        spokesman = logging.getLogger(f"{package}.utilities.rank_zero")
        spokesman.setLevel(logging.INFO)
        spokesman.addFilter(_is_worth_reading)
    for part in ("callbacks", "profilers"):
        logging.getLogger(f"lightning.pytorch.{part}").setLevel(logging.INFO)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "callbacks" in Path(record.pathname).parts
