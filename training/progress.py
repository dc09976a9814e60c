"""How far a run is: a bar in a terminal."""

import logging
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's, with the step of the whole run instead of an end of epochs that has none.

    The loss is shown every `trainer.log_every_n_steps` steps, when it is read anyway: to read it is
    to wait for the GPU.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._loss: dict[str, float] = {}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._loss = {"loss": float(trainer.callback_metrics["trainer/loss"])}
        super().on_train_batch_end(trainer, *args)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the logger's number of the run
        return {"step": f"{trainer.global_step}/{trainer.max_steps}"} | metrics | self._loss


def quiet_known_noise() -> None:
    """Silence what Lightning and its libraries say in every run and nobody can act on."""
    for message in (
        "`isinstance\\(treespec",
        ".*set_vital.* is deprecated",
        "The '.*_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=message)
    advertisement = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertisement.addFilter(lambda record: "litlogger" not in record.getMessage())
