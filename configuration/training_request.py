"""What the sections of a training ask for: the trainer, its callbacks, where numbers are logged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configuration.resolvers import world_size


@dataclass(frozen=True, kw_only=True)
class TrainerRequest:
    """The sections `trainer` and `strategy`.

    Attributes:
        arguments: of Lightning's trainer, as Hydra's `instantiate` takes them.
        strategy: likewise, of the strategy of several processes.
        precision: Lightning's name of it.
        world_size: processes of the run.
    """

    arguments: Mapping[str, Any]
    strategy: Mapping[str, Any]
    precision: str
    world_size: int

    # Flags of Lightning's trainer that users add (`+trainer.NAME=`), and what follows from them.

    @property
    def is_rehearsal(self) -> bool:
        """`fast_dev_run`: a few batches, of which nothing is kept."""
        return bool(self.arguments.get("fast_dev_run"))

    @property
    def is_bare(self) -> bool:
        """`barebones`: steps alone, to measure them."""
        return bool(self.arguments.get("barebones"))

    @property
    def overfit_batches(self) -> int | float:
        """The number or fraction of batches that all epochs repeat; 0: off."""
        return self.arguments.get("overfit_batches") or 0

    @property
    def shows_progress(self) -> bool:
        """`enable_progress_bar`."""
        return not self.is_bare and self.arguments.get("enable_progress_bar") is not False

    @property
    def keeps_checkpoints(self) -> bool:
        """`enable_checkpointing`."""
        is_wanted = self.arguments.get("enable_checkpointing") is not False
        return is_wanted and not self.is_bare and not self.is_rehearsal

    @property
    def logs(self) -> bool:
        """`logger`, and neither of the above."""
        is_wanted = self.arguments.get("logger") is not False
        return is_wanted and not self.is_bare and not self.is_rehearsal


@dataclass(frozen=True, kw_only=True)
class LoggerRequest:
    """The sections `logger` and `wandb`.

    Attributes:
        name: wandb, tensorboard or csv.
        wandb: arguments of `wandb.init`; None: no Weights & Biases.
        save_dir: `checkpointing.save_dir`.
        is_resumed: whether a run that finds its own id there keeps it.
        seed: of the run, part of the default id.
        run_config: the whole configuration, which is logged too.
    """

    name: str
    wandb: Mapping[str, Any] | None
    save_dir: str
    is_resumed: bool
    seed: int
    run_config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What a training needs besides its model and its rows.

    Attributes:
        trainer, loggers: see there.
        callbacks: by name, as Hydra's `instantiate` takes them.
        ema: decay of the moving average; 0: none.
        save_dir: where checkpoints go.
        rows_per_batch: rows that all processes together take at a time.
        seed: of the run.
        run_config: the whole configuration.
    """

    trainer: TrainerRequest
    loggers: LoggerRequest
    callbacks: Mapping[str, Mapping[str, Any]]
    ema: float
    save_dir: str
    rows_per_batch: int
    seed: int
    run_config: Mapping[str, Any]


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration, or a section of one, as nested dictionaries, lists and scalars."""
    return OmegaConf.to_container(config, resolve=True)


def trainer_request(config: DictConfig) -> TrainerRequest:
    """The request of a composed configuration."""
    arguments = plain(config.trainer)
    if str(arguments["devices"]).strip() == "-1":
        arguments["devices"] = "auto"  # the same, also where the CPU is the only device
    return TrainerRequest(
        arguments=arguments,
        strategy=plain(config.strategy),
        precision=lightning_precision(config.trainer.precision),
        world_size=world_size(config.trainer),
    )


def training_request(config: DictConfig) -> TrainingRequest:
    """The request of a composed configuration, in which the batch size is a number."""
    trainer, loggers = trainer_request(config), logger_request(config)
    return TrainingRequest(
        trainer=trainer,
        loggers=loggers,
        callbacks=loggers.run_config["callbacks"] or {},
        ema=config.training.ema,
        save_dir=config.checkpointing.save_dir,
        rows_per_batch=config.loader.batch_size * trainer.world_size,
        seed=config.seed,
        run_config=loggers.run_config,
    )


def logger_request(config: DictConfig) -> LoggerRequest:
    """The request of a composed configuration."""
    return LoggerRequest(
        name=config.logger.name,
        wandb=None if config.wandb is None else plain(config.wandb),
        save_dir=config.checkpointing.save_dir,
        is_resumed=config.checkpointing.resume_from_ckpt,
        seed=config.seed,
        run_config=plain(config),
    )


def lightning_precision(precision: str | int) -> str:
    """Lightning's name of a precision; the original's configs say `bf16` for mixed bf16."""
    names = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}
    return names.get(str(precision), str(precision))
