"""Going on where a run stopped: the newest whole checkpoint, and what Lightning's lacks."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    fit_loop = trainer.fit_loop
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)


class ResumeState(L.Callback):
    """Adds to checkpoints what Lightning leaves out, and takes it up again.

    - A validation that was due when the checkpoint was written: Lightning skips it, and with it
      the clipped range that it finds.
    - The position in the data of every process, not of the first alone.
    - Which step was saved last: a resumed run would save in the midst of gradient accumulation.
    """

    def __init__(self):
        self._validation_is_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"validation_is_due": self._validation_is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validation_is_due = state_dict["validation_is_due"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]
        if trainer.world_size > 1 and "combined_loader" in loop:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, loop["combined_loader"])
            loop["combined_loader_per_rank"] = states

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]
        states = loop.pop("combined_loader_per_rank", [])
        if len(states) == trainer.world_size:
            loop["combined_loader"] = states[trainer.global_rank]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = trainer.global_step
        if self._validation_is_due:
            self._validate(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self._validation_is_due = validation_is_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_is_due = False

    def _validate(self, trainer: L.Trainer) -> None:
        """Run the validation that was due, as the training loop does."""
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
