"""The Lightning trainer of a run, with its callbacks and loggers."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from checkpointing.checkpoint_io import AtomicCheckpointIO
from configuration.training_request import TrainerRequest, TrainingRequest
from training.callbacks import EMACallback, LastCheckpoint, RegularCheckpoint
from training.instantiation import instantiated
from training.loggers import build_loggers
from training.manifest import RunManifest
from training.nan_guard import NanGuard
from training.parallel import in_words_of_this_torch
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
    is_parallel, strategy = request.world_size > 1, in_words_of_this_torch(request.strategy)
    quiet = {} if request.is_bare else {"enable_model_summary": False}
    arguments = {"default_root_dir": os.getcwd(), **quiet, **request.arguments}
    return instantiated(
        arguments,
        key="trainer",
        precision=request.precision,
        strategy=instantiated(strategy, key="strategy") if is_parallel else "auto",
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
    progress = [progress_callback()] if request.shows_progress else []
    return bare_trainer(
        request,
        check_val_every_n_epoch=request.arguments["check_val_every_n_epoch"] or every_epoch,
        callbacks=[*progress, *callbacks],
        logger=list(loggers) or False,
        plugins=[AtomicCheckpointIO()],
        **_settings_of_flags(request),
    )


def _settings_of_flags(request: TrainerRequest) -> dict[str, Any]:
    """What Lightning is told instead of what was typed, which means the same there."""
    settings: dict[str, Any] = {}
    if request.is_bare:  # Lightning refuses them beside it, and the configuration has numbers
        settings |= {"log_every_n_steps": None, "num_sanity_val_steps": None}
    elif not request.keeps_checkpoints:
        # `StopOnSignal` is a `Checkpoint` too, and Lightning would refuse it.
        settings |= {"enable_checkpointing": None}
    if request.overfit_batches:
        # Lightning would put a sampler of its own into the loader, the same rows on every rank.
        # Which rows an epoch has is the loader's business, see `RowOrder`.
        settings |= dict.fromkeys(
            ("limit_train_batches", "limit_val_batches"), request.overfit_batches
        )
        settings |= {"overfit_batches": 0}
    return settings


def training_trainer(request: TrainingRequest, *, signals: StopSignals) -> L.Trainer:
    """The trainer of a training, with its callbacks and loggers.

    Args:
        request: what the training asks for.
        signals: what ends it.
    """
    loggers = build_loggers(request.loggers) if request.trainer.logs else []
    return build_trainer(
        request.trainer,
        callbacks=_training_callbacks(request, signals),
        loggers=loggers,
    )


def _written_once(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section of `callbacks` with our class in the place of Lightning's, whose settings it has.

    The configuration keeps the name that the original has there.
    """
    if section.get("_target_") != "lightning.pytorch.callbacks.ModelCheckpoint":
        return section
    return {**section, "_target_": f"{RegularCheckpoint.__module__}.{RegularCheckpoint.__name__}"}


def _training_callbacks(request: TrainingRequest, signals: StopSignals) -> list[L.Callback]:
    average = [EMACallback(request.ema)] if request.ema > 0 else []
    if request.trainer.is_bare:  # nothing but what belongs to a step
        return average
    callbacks = [
        instantiated(_written_once(callback), key=f"callbacks.{name}")
        for name, callback in request.callbacks.items()
    ]
    unwanted: tuple[type[L.Callback], ...] = ()
    if not request.trainer.keeps_checkpoints:
        unwanted += (ModelCheckpoint,)
    if not request.trainer.logs:  # it refuses to be without a logger
        unwanted += (LearningRateMonitor,)
    callbacks = [callback for callback in callbacks if not isinstance(callback, unwanted)]
    callbacks += average
    callbacks += [NanGuard(request.save_dir), Throughput()]
    if not request.trainer.is_rehearsal:
        callbacks.append(RunManifest(f"{request.save_dir}/manifest.json", request.run_config))
    # The last one: a validation that was due is made up for when all others have begun.
    last = LastCheckpoint()
    is_stream = request.run_config["data"]["streaming"]
    resume = ResumeState(request.rows_per_batch, is_stream=is_stream)
    return [*callbacks, resume, last, StopOnSignal(signals, last)]
