"""The Lightning trainer that the sections `trainer`, `strategy` and `callbacks` describe."""

import os
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from checkpointing.checkpoint_io import AtomicCheckpointIO
from configuration.resolvers import world_size
from configuration.training_request import lightning_precision
from training.callbacks import EMACallback, LastCheckpoint
from training.loggers import build_loggers
from training.manifest import RunManifest
from training.nan_guard import NanGuard
from training.progress import ProgressBar
from training.resume import ResumeState
from training.signals import StopOnSignal, StopSignals
from training.throughput import Throughput


def bare_trainer(config: DictConfig, **settings: Any) -> L.Trainer:
    """The trainer of `trainer` and `strategy` alone.

    Args:
        config: the composed configuration.
        settings: further arguments of Lightning's trainer, which go before those of `trainer`.
    """
    is_parallel = world_size(config.trainer) > 1
    return hydra.utils.instantiate(
        config.trainer,
        default_root_dir=os.getcwd(),
        enable_model_summary=False,
        precision=lightning_precision(config.trainer.precision),
        strategy=hydra.utils.instantiate(config.strategy) if is_parallel else "auto",
        use_distributed_sampler=False,  # the data loaders know their rank
        **settings,
    )


def build_trainer(config: DictConfig, *, signals: StopSignals | None = None) -> L.Trainer:
    """The trainer of a run, with its callbacks and loggers.

    Args:
        config: the composed configuration.
        signals: what ends a training; None: the trainer is only to evaluate.
    """
    callbacks: list[L.Callback] = [ProgressBar()]
    loggers: list[Logger] = []
    if signals is not None:
        callbacks += _training_callbacks(config, signals)
        loggers = build_loggers(config)
    # An integer interval counts batches across epochs, a float is a fraction of each epoch.
    every_epoch = None if isinstance(config.trainer.val_check_interval, int) else 1
    return bare_trainer(
        config,
        check_val_every_n_epoch=config.trainer.check_val_every_n_epoch or every_epoch,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
    )


def _training_callbacks(config: DictConfig, signals: StopSignals) -> list[L.Callback]:
    callbacks = [hydra.utils.instantiate(c) for c in config.callbacks.values()]
    if config.training.ema > 0:
        callbacks.append(EMACallback(config.training.ema))
    save_dir = config.checkpointing.save_dir
    manifest = RunManifest(f"{save_dir}/manifest.json", config)
    callbacks += [NanGuard(save_dir), Throughput(), manifest]
    # The last one: a validation that was due is made up for when all others have begun.
    rows_per_batch = config.loader.batch_size * world_size(config.trainer)
    last = LastCheckpoint()
    return [*callbacks, ResumeState(rows_per_batch), last, StopOnSignal(signals, last)]
