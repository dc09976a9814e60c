"""Where a training's numbers go: a CSV file always, and Weights & Biases or TensorBoard."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from configuration.training_request import LoggerRequest
from utils import file_exists, get_logger, write_text

logger = get_logger(__name__)

# How long the end of a run waits for a server that has gone, in seconds; wandb's own is for ever.
_WANDB_FINISH_TIMEOUT = 60


def build_loggers(request: LoggerRequest) -> list[Logger]:
    """The CSV file, and what `logger` asks for; `wandb=null` leaves out Weights & Biases.

    Args:
        request: the sections `logger` and `wandb`; the working directory is the run's.
    """
    loggers: list[Logger] = [CSVLogger(os.getcwd(), name="metrics")]
    if request.name == "wandb" and request.wandb is not None:
        loggers.append(_wandb_logger(wandb_arguments(request)))
    if request.name == "tensorboard":
        # A run that goes on writes beside its earlier events, and TensorBoard joins them.
        loggers.append(TensorBoardLogger(request.save_dir, name="tensorboard", version=""))
    return loggers


def metrics_file(loggers: Sequence[Logger]) -> Path | None:
    """The CSV file of a training's numbers; None where a flag of the trainer wants none."""
    found = (Path(each.log_dir) / "metrics.csv" for each in loggers if isinstance(each, CSVLogger))
    return next(found, None)


def _wandb_logger(arguments: dict) -> WandbLogger:
    """Connects now; offline where the server cannot be reached, which would end a requeued job."""
    import wandb
    from wandb.errors import CommError

    found = WandbLogger(**arguments)
    try:
        found.experiment  # noqa: B018
    except CommError as error:
        logger.warning("wandb: no answer, logging offline (`wandb sync` sends it later): %s", error)
        wandb.teardown()  # or it takes the run's id for one in use
        found = WandbLogger(**arguments | {"offline": True, "mode": "offline"})
    return found


def wandb_arguments(request: LoggerRequest) -> dict[str, Any]:
    """The section `wandb`, the configuration and the run's id; offline without an API key.

    Where the server goes away during the run, training goes on and wandb keeps what it could not
    send; at the end it tries for a minute more, or for `wandb.settings.finish_timeout` seconds.
    """
    import wandb

    arguments = {**request.wandb, "config": request.run_config, "id": wandb_id(request)}
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings = arguments.get("settings") or {}
        arguments["settings"] = {"finish_timeout": _WANDB_FINISH_TIMEOUT} | settings
    is_decided = "offline" in arguments or "WANDB_MODE" in os.environ
    if not is_decided and not wandb.login(prompt=False, verify=False):
        logger.warning("wandb: no API key, logging offline (`wandb login`, or wandb=null for none)")
        # `mode` too: asking for the key has fixed wandb's settings, which `offline` would go by.
        arguments |= {"offline": True, "mode": "offline"}
    return arguments


def wandb_id(request: LoggerRequest) -> str:
    """The run's id, kept in `wandb_id.txt` of `checkpointing.save_dir`.

    A training that goes on keeps its id, whatever its command says by then. The default id is
    made of `wandb.name` and the seed; a run without a name gets one that no other run has.
    """
    path = f"{request.save_dir}/wandb_id.txt"
    if request.is_resumed and file_exists(path):
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return file.read().strip()
    found = request.wandb["id"]
    if found is None or found == f"None_{request.seed}":
        found = uuid.uuid4().hex[:8]
    if rank_zero_only.rank == 0:  # the others log nothing, under any id
        write_text(path, f"{found}\n")
    return found
