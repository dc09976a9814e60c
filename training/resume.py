"""Going on where a run stopped: the newest whole checkpoint, and what Lightning's lacks."""

import re
import zipfile
from copy import deepcopy
from typing import Any

import fsspec
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from training.manifest import describe_rows
from training.optimizer import use_settings
from utils import get_logger

logger = get_logger(__name__)


def newest_whole_checkpoint(directory: str) -> str | None:
    """The checkpoint to go on from: last.ckpt, or where it is damaged that of the highest step.

    The step in the name counts, `...step.ckpt`, not the time of a file, since clocks are set.

    Returns:
        A path or URL; None where there is no checkpoint at all.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    fs, name = fsspec.core.url_to_fs(directory)
    if not fs.exists(name):
        return None
    files = [path.rsplit("/", 1)[-1] for path in fs.ls(name, detail=False)]
    steps = {file: match for file in files if (match := re.search(r"(\d+)\.ckpt$", file))}
    candidates = sorted(steps, key=lambda file: int(steps[file][1]), reverse=True)
    candidates = [file for file in files if file == "last.ckpt"] + candidates
    problems = []
    for file in candidates:
        path = f"{directory}/{file}"
        problem = _damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s); looking for the one before it", path, problem)
        problems.append(file)
    if problems:
        raise ValueError(
            f"{directory}: all checkpoints are damaged ({', '.join(problems)}); allowed: "
            "checkpointing.resume_ckpt_path=FILE for another one, and to start anew "
            "checkpointing.resume_from_ckpt=false"
        )
    return None


def _damage(path: str) -> str | None:
    """What is wrong with a checkpoint file, None where it is whole."""
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            broken = archive.testzip()  # compares the checksum of every member
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return None if broken is None else f"{broken} is not what was written"


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    fit_loop = trainer.fit_loop
    return fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)


class ResumeState(L.Callback):
    """Adds to checkpoints what Lightning leaves out, and takes it up again.

    - A validation that was due when the checkpoint was written: Lightning skips it, and with it
      the clipped range that it finds.
    - The position in the data: of every process, not of the first alone, and without the batch
      that Lightning has read ahead of a stream.
    - Batches are counted as this run would have counted them, whatever the number of processes
      and of batches per step was.
    - The mean of `train/nll` since the epoch began.

    The optimizer, which Lightning gives the checkpoint's settings, goes on with those of this run.

    Args:
        rows_per_batch: rows that all processes together take at a time.
        is_stream: whether rows are made while training.
    """

    def __init__(self, rows_per_batch: int, *, is_stream: bool = False):
        self.rows_per_batch = rows_per_batch
        self.is_stream = is_stream
        self._is_resumed = False
        self._rows: dict[str, Any] | None = None
        self._validation_is_due = False
        self._epoch_is_unlogged = False
        self._is_prolonged = False
        self._progress: tuple[dict[str, Any], dict[str, Any]] | None = None

    # --- saving ----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self._validation_is_due = validation_is_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validation_is_due = False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        fit_loop = trainer.fit_loop
        unused = len(getattr(fit_loop._data_fetcher, "batches", ()))
        position = fit_loop._combined_loader.flattened[0].state_dict(unused=unused)
        positions = [position] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(positions, position)
        with pl_module.train_nll.sync_context():
            train_nll = [float(getattr(pl_module.train_nll, name)) for name in _NLL_STATES]
        checkpoint["resume"] = {
            "validation_is_due": self._validation_is_due,
            "rows_per_batch": self.rows_per_batch,
            "positions": positions,
            "rows": describe_rows(trainer.train_dataloader),
            "train_nll": train_nll,
        }
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader")

    # --- resuming --------------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._is_resumed = True
        state = checkpoint.get("resume")
        loop = checkpoint["loops"]["fit_loop"]
        if state is None:
            loop["state_dict"].pop("combined_loader", None)
            logger.warning("The checkpoint lacks its place in the data: the epoch begins anew")
            return
        self._restore_position(trainer, loop, state)
        self._rows = state.get("rows")
        self._validation_is_due = state["validation_is_due"]
        self._epoch_is_unlogged = (
            loop["epoch_loop.batch_progress"]["is_last_batch"] and state["train_nll"][1] > 0
        )
        if trainer.is_global_zero:
            for name, value in zip(_NLL_STATES, state["train_nll"], strict=True):
                getattr(pl_module.train_nll, name).fill_(value)
        self._progress = deepcopy((loop["epoch_progress"], loop["epoch_loop.batch_progress"]))
        # A training at its end does not even start, and its last validation would be missing.
        self._is_prolonged = (
            self._validation_is_due and trainer.max_steps == checkpoint["global_step"]
        )
        trainer.fit_loop.epoch_loop.max_steps += self._is_prolonged

    def _restore_position(
        self, trainer: L.Trainer, loop: dict[str, Any], state: dict[str, Any]
    ) -> None:
        positions = state["positions"]
        if ("first_row" not in positions[0]) is not self.is_stream:
            logger.warning(
                "data.streaming=%s, and it was not so in the checkpoint: the epoch begins anew",
                str(self.is_stream).lower(),
            )
        elif not self.is_stream or len(positions) == trainer.world_size:
            own = positions[trainer.global_rank % len(positions)]
            loop["state_dict"]["combined_loader"] = [own]
        else:
            logger.warning(
                "The checkpoint is of %d processes, this run has %d: a stream has a position per "
                "process, so it begins its epoch anew",
                len(positions),
                trainer.world_size,
            )
        _count_anew(loop["epoch_loop.batch_progress"], state["rows_per_batch"], self.rows_per_batch)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _check_same_step(trainer)
        if self._is_resumed:
            (schedule,) = trainer.lr_scheduler_configs
            use_settings(
                trainer.optimizers[0], schedule.scheduler, **pl_module.optimizer_settings()
            )
            self._compare_rows(describe_rows(trainer.train_dataloader))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):  # it would save amid gradient accumulation
                callback._last_global_step_saved = trainer.global_step
        trainer.fit_loop.epoch_loop.max_steps -= self._is_prolonged
        if self._validation_is_due:
            self._validate(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._close_epoch(trainer, pl_module)

    def _compare_rows(self, rows: dict[str, Any] | None) -> None:
        if None not in (rows, self._rows) and rows["sha256"] != self._rows["sha256"]:
            logger.warning(
                "The %d training rows are not the %d of the checkpoint (other text, model.length "
                "or keys of data): the run goes on at the same place of the epoch, in which some "
                "may come twice and others not at all", rows["rows"], self._rows["rows"],
            )  # fmt: skip

    def _validate(self, trainer: L.Trainer) -> None:
        """Run the validation that was due, as the training loop does, with its counters."""
        fit_loop = trainer.fit_loop
        progress = (fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress)
        begun = deepcopy([counters.state_dict() for counters in progress])
        for counters, state in zip(progress, self._progress, strict=True):
            counters.load_state_dict(state)
        fit_loop.epoch_loop.batch_progress.total.completed = self._progress[1]["total"]["ready"]
        fit_loop.epoch_loop.batch_progress.current.completed = self._progress[1]["current"]["ready"]
        trainer.validating = True
        fit_loop.epoch_loop.val_loop.restarting = False
        fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        for counters, state in zip(progress, begun, strict=True):
            counters.load_state_dict(state)

    def _close_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the next epoch; Lightning would neither log the old one nor end that of a stream.

        It goes by these marks: the counters, and whether its loops are being restarted.
        """
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        metric, epoch = pl_module.train_nll, self._progress[0]["current"]["completed"]
        if self._epoch_is_unlogged:
            metric._update_count = 1  # or torchmetrics warns that nothing has been added to it
            values = {"train/nll": metric.compute().item(), "epoch": epoch}
            for run_logger in trainer.loggers:
                run_logger.log_metrics(values, step=trainer.global_step - 1)
            metric.reset()
        for counters in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
            counters.reset()
            counters.increment_by(epoch + 1)
        epoch_loop.batch_progress.total.completed = epoch_loop.batch_progress.total.ready
        epoch_loop._batches_that_stepped = trainer.global_step
        for loop in (fit_loop, epoch_loop, epoch_loop.val_loop):
            loop._restarting = False
            loop.reset_restart_stage()


_NLL_STATES = ("total", "num_tokens", "num_rows")


def _count_anew(progress: dict[str, Any], old_rows: int, new_rows: int) -> None:
    """Rewrite Lightning's counters of batches of `old_rows` rows to batches of `new_rows`."""
    for counters in (progress["total"], progress["current"]):
        batches = counters["ready"]
        lag = batches - counters["completed"]  # 1 where the batch's last hooks were running
        batches = batches * old_rows // new_rows
        counters |= dict.fromkeys(("ready", "started", "processed"), batches)
        counters["completed"] = batches - lag


def _check_same_step(trainer: L.Trainer) -> None:
    """Every process must have found the same checkpoint, on whatever disk it looked."""
    steps = [trainer.global_step] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(steps, trainer.global_step)
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes resume from different steps, {steps}: checkpointing.save_dir must be "
            "one directory that all of them see"
        )
