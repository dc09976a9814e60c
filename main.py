"""Train, evaluate or sample: `python main.py mode=train|ppl_eval|sample_eval [key=value ...]`."""

import os
import signal
import sys
from pathlib import Path

import hydra
import lightning as L
from omegaconf import DictConfig, OmegaConf

from checkpointing.loading import load_weights
from checkpointing.weights import read_weights
from configuration import ignored_key_warnings, validate
from configuration.resolvers import register_resolvers
from configuration.sampling_request import given_texts, sampling_options
from dataloader import get_dataloaders, get_tokenizer
from diffusion import Diffusion
from evaluation.report import draw_training_curve
from modes.batch_size import find_batch_size
from modes.ppl_eval import ppl_eval
from modes.sample_eval import sample_eval
from modes.starting_weights import new_model
from training.parallel import leave_process_group
from training.progress import quiet_known_noise
from training.resume import newest_whole_checkpoint
from training.signals import Interrupted, StopSignals
from training.trainer import build_trainer
from utils import absolute_path, file_exists, get_logger, keep_freed_memory

logger = get_logger(__name__)
register_resolvers()

# A run changes into its own directory. These keys are read as seen from where it was started:
PATH_KEYS = (
    "data.path",
    "data.train_path",
    "data.valid_path",
    "data.cache_dir",
    "eval.results_path",
    "sampling.prompts",
    "sampling.infill",
    "sampling.trace",
    "checkpointing.save_dir",
    "checkpointing.resume_ckpt_path",
)
# These may also be the name of something on the Hub, and are paths where such a path exists.
PATH_OR_NAME_KEYS = (
    "data.tokenizer_name_or_path",
    "eval.checkpoint_path",
    "eval.gen_ppl_eval_model_name_or_path",
    "training.from_pretrained",
)


def make_paths_absolute(config: DictConfig, *, launch_dir: str) -> None:
    """Rewrite relative paths in place, as seen from the directory of the command."""
    for key in PATH_KEYS + PATH_OR_NAME_KEYS:
        value = OmegaConf.select(config, key)
        if not isinstance(value, str) or not value:
            continue
        path = absolute_path(value, base=launch_dir)
        if key in PATH_KEYS or file_exists(path):
            OmegaConf.update(config, key, path)


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
            f"checkpointing.resume_ckpt_path={path}: there is no such file; allowed are a "
            "checkpoint and, to start anew, null or checkpointing.resume_from_ckpt=false"
        )
    return path


def train(config: DictConfig, *, signals: StopSignals) -> None:
    """Train, resuming from `checkpointing.resume_ckpt_path` where that exists."""
    resume = checkpoint_to_resume(config)
    tokenizer = get_tokenizer(config)
    if config.loader.batch_size == "auto":
        find_batch_size(config, tokenizer)
    L.seed_everything(config.seed, verbose=False)
    # A run that goes on has its weights from its own checkpoint.
    model = new_model(config, tokenizer) if resume is None else Diffusion(config, tokenizer)
    num_parameters = sum(p.numel() for p in model.parameters())
    logger.info("%s: %.1f M parameters", config.algo.name, num_parameters / 1e6)
    trainer = build_trainer(config, signals=signals)
    train_loader, valid_loader = get_dataloaders(
        config, tokenizer, rank=trainer.global_rank, world_size=trainer.world_size
    )
    if resume is not None:
        # Lightning reads it again, but what does not fit is said clearly here.
        load_weights(model, read_weights(resume), use_ema=False)
    try:
        trainer.fit(model, train_loader, valid_loader, ckpt_path=resume, weights_only=True)
    finally:
        train_loader.shut_down()
        valid_loader.shut_down()
    trainer.strategy.checkpoint_io.raise_if_last_failed()
    if trainer.is_global_zero:
        curve = Path("training_curve.png").absolute()
        draw_training_curve(
            Path(trainer.logger.log_dir) / "metrics.csv",
            curve,
            title=f"{config.algo.name} on {config.data.train}, block size {config.block_size}",
        )
        logger.info("Training curve: %s", curve)


def run(config: DictConfig, *, launch_dir: str) -> None:
    """Validate, then carry out `mode` and the modes of `then` in the working directory.

    Args:
        config: the composed configuration; its relative paths are made absolute in place.
        launch_dir: where the command was typed.
    """
    quiet_known_noise()
    keep_freed_memory()
    validate(config)
    sampling_options(config)  # refuses now what samplers could not do after a training
    for warning in ignored_key_warnings(config):
        logger.warning(warning)
    make_paths_absolute(config, launch_dir=launch_dir)
    modes = (config.mode, *config.then)
    if "sample_eval" in modes:
        given_texts(config)  # likewise: a broken line in them is found before a training
    for mode in modes:
        if mode == "train":
            with StopSignals() as signals:
                train(config, signals=signals)
        elif mode == "ppl_eval":
            ppl_eval(config, build_trainer(config))
        else:
            sample_eval(config)
    logger.info("Everything is in %s", os.getcwd())


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run(config, launch_dir=hydra.utils.get_original_cwd())
    except (ValueError, OSError) as error:
        # What the user can mend is said in one line; HYDRA_FULL_ERROR=1 shows the rest.
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        logger.error("%s", error)
        sys.exit(1)
    except Interrupted as stop:
        logger.warning("%s; the same command goes on from here", stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        logger.warning("Stopped by Ctrl-C; what is written stays")
        sys.exit(128 + signal.SIGINT)
    finally:
        leave_process_group()


if __name__ == "__main__":
    main()
