"""Training (`mode=train`): begins, or goes on from a checkpoint."""

from pathlib import Path

import lightning as L
from omegaconf import DictConfig

from checkpointing.loading import load_weights
from checkpointing.weights import read_weights
from configuration import validate
from configuration.data_request import data_request
from configuration.training_request import trainer_request, training_request
from dataloader import get_dataloaders
from diffusion import Diffusion
from evaluation.report import draw_training_curve
from modes.batch_size import find_batch_size, with_batch_size
from modes.resumed_keys import resumed_config
from modes.starting_weights import check_tokenizer, new_model, tokenizer_of
from training.loggers import metrics_file
from training.resume import newest_whole_checkpoint
from training.run_lock import only_training_in
from training.signals import StopSignals
from training.trainer import training_trainer
from training.typed_keys import typed_keys
from utils import absolute_path, file_exists, get_logger

logger = get_logger(__name__)

RESUME_KEY = "checkpointing.resume_ckpt_path"


def train(config: DictConfig) -> None:
    """Train, resuming from `checkpointing.resume_ckpt_path` where that exists.

    Raises:
        Interrupted: a signal ended it; the same command goes on.
        ValueError: another training writes into the same directory.
    """
    with StopSignals() as signals, only_training_in(config.checkpointing.save_dir):
        is_rehearsal = trainer_request(config).is_rehearsal  # of which no checkpoint remains
        resume = None if is_rehearsal else checkpoint_to_resume(config)
        source = resume or config.training.from_pretrained
        weights = None if source is None else read_weights(source)
        if resume is not None:
            config = resumed_config(config, weights.run_config, typed=typed_keys())
        tokenizer = tokenizer_of(config, weights)
        if config.loader.batch_size == "auto":
            config = with_batch_size(config, find_batch_size(config, tokenizer))
            validate(config)
            logger.info(
                "loader.batch_size=auto: %d rows per device, trainer.accumulate_grad_batches=%d",
                config.loader.batch_size,
                config.trainer.accumulate_grad_batches,
            )
        request, data = training_request(config), data_request(config)
        L.seed_everything(request.seed, verbose=False)
        # A run that goes on has its weights from its own checkpoint.
        if resume is None:
            model = new_model(config, tokenizer, weights)
        else:
            model = Diffusion(config, tokenizer)
        num_parameters = sum(p.numel() for p in model.parameters())
        logger.info("%s: %.1f M parameters", config.algo.name, num_parameters / 1e6)
        trainer = training_trainer(request, signals=signals)
        train_loader, valid_loader = get_dataloaders(
            data, tokenizer, rank=trainer.global_rank, world_size=trainer.world_size
        )
        if resume is not None:
            logger.info("Going on from the checkpoint %s", resume)
            # Lightning reads it again, but what does not fit is said clearly here.
            check_tokenizer(weights, tokenizer, key=RESUME_KEY, name=data.tokenizer_name_or_path)
            load_weights(model, weights, use_ema=False)
        del weights
        try:
            trainer.fit(model, train_loader, valid_loader, ckpt_path=resume, weights_only=True)
        finally:
            train_loader.shut_down()
            valid_loader.shut_down()
        trainer.strategy.checkpoint_io.raise_if_last_failed()
        metrics = metrics_file(trainer.loggers)
        if trainer.is_global_zero and metrics is not None:
            title = f"{config.algo.name} on {data.train}, block size {config.block_size}"
            curve = Path("training_curve.png").absolute()
            draw_training_curve(metrics, curve, title=title)
            logger.info("Training curve: %s", curve)


def checkpoint_to_resume(config: DictConfig) -> str | None:
    """The checkpoint that training goes on from, None to start anew.

    Raises:
        FileNotFoundError: if the user named a checkpoint that is not there. The default one,
            `last.ckpt` under `checkpointing.save_dir`, may be missing: the first run has none.
            Where it is damaged, the one before it is taken.
    """
    path, save_dir = config.checkpointing.resume_ckpt_path, config.checkpointing.save_dir
    if not config.checkpointing.resume_from_ckpt or path is None:
        return None
    directory = absolute_path(f"{save_dir}/checkpoints")
    if path == f"{directory}/last.ckpt":
        return newest_whole_checkpoint(directory)
    if not file_exists(path):
        raise FileNotFoundError(
            f"{RESUME_KEY}={path}: there is no such file; allowed are a "
            "checkpoint and, to start anew, null or checkpointing.resume_from_ckpt=false"
        )
    return path
