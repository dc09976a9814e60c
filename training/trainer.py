"""The Lightning trainer of a run, with its callbacks and loggers."""

import os
from collections.abc import Sequence
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.loggers import Logger

from checkpointing.checkpoint_io import AtomicCheckpointIO
from configuration.training_request import TrainerRequest, TrainingRequest
from training.callbacks import EMACallback, LastCheckpoint
from training.loggers import build_loggers
from training.manifest import RunManifest
from training.nan_guard import NanGuard
from training.progress import progress_callback
from training.resume import ResumeState
from training.signals import StopOnSignal, StopSignals
from training.throughput import Throughput


def bare_trainer(request: TrainerRequest, **settings: Any) -> L.Trainer:
    """The trainer of the sections `trainer` and `strategy` alone.

    Args:
        request: these sections.
        settings: further arguments of Lightning's trainer, which go before those of `trainer`.
    """
    is_parallel = request.world_size > 1
    return hydra.utils.instantiate(
        request.arguments,
        default_root_dir=os.getcwd(),
        enable_model_summary=False,
        precision=request.precision,
        strategy=hydra.utils.instantiate(request.strategy) if is_parallel else "auto",
        use_distributed_sampler=False,  # the data loaders know their rank
        **settings,
    )


def build_trainer(
    request: TrainerRequest,
    *,
    callbacks: Sequence[L.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> L.Trainer:
    """The trainer of a run, which shows how far it is; alone it only evaluates.

    Args:
        request: the sections `trainer` and `strategy`.
        callbacks: what else there is to do.
        loggers: where numbers go.
    """
    interval = request.arguments["val_check_interval"]
    # An integer interval counts batches across epochs, a float is a fraction of each epoch.
    every_epoch = None if isinstance(interval, int) else 1
    return bare_trainer(
        request,
        check_val_every_n_epoch=request.arguments["check_val_every_n_epoch"] or every_epoch,
        callbacks=[progress_callback(), *callbacks],
        logger=list(loggers),
        plugins=[AtomicCheckpointIO()],
    )


def training_trainer(request: TrainingRequest, *, signals: StopSignals) -> L.Trainer:
    """The trainer of a training, with its callbacks and loggers.

    Args:
        request: what the training asks for.
        signals: what ends it.
    """
    return build_trainer(
        request.trainer,
        callbacks=_training_callbacks(request, signals),
        loggers=build_loggers(request.loggers),
    )


def _training_callbacks(request: TrainingRequest, signals: StopSignals) -> list[L.Callback]:
    callbacks = [hydra.utils.instantiate(callback) for callback in request.callbacks]
    if request.ema > 0:
        callbacks.append(EMACallback(request.ema))
    manifest = RunManifest(f"{request.save_dir}/manifest.json", request.run_config)
    callbacks += [NanGuard(request.save_dir), Throughput(), manifest]
    # The last one: a validation that was due is made up for when all others have begun.
    last = LastCheckpoint()
    is_stream = request.run_config["data"]["streaming"]
    resume = ResumeState(request.rows_per_batch, is_stream=is_stream)
    return [*callbacks, resume, last, StopOnSignal(signals, last)]
