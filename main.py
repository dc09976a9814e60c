"""Train, evaluate or sample: `python main.py mode=train|ppl_eval|sample_eval [key=value ...]`."""

import os
import signal
import sys

import hydra
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from configuration import ignored_key_warnings, validate
from configuration.paths import with_absolute_paths
from configuration.resolvers import register_resolvers
from configuration.sampling_request import sampling_request
from modes.ppl_eval import ppl_eval
from modes.sample_eval import sample_eval
from modes.train import train
from training.parallel import leave_process_group
from training.progress import quiet_known_noise
from training.signals import Interrupted
from utils import get_logger, keep_freed_memory, one_line, print_without_fail

logger = get_logger(__name__)
register_resolvers()

# What the user can mend: values, files, sizes, and what Lightning and OmegaConf say of keys. All
# else is an error of the program, whose traceback is wanted.
USER_ERRORS = (
    ValueError, OSError, MisconfigurationException, OmegaConfBaseException, torch.OutOfMemoryError,
)  # fmt: skip
MODES = {"train": train, "ppl_eval": ppl_eval, "sample_eval": sample_eval}


def run(config: DictConfig, *, launch_dir: str) -> None:
    """Validate, then carry out `mode` and the modes of `then` in the working directory.

    Args:
        config: the composed configuration.
        launch_dir: where the command was typed, from where its relative paths are seen.
    """
    quiet_known_noise()
    keep_freed_memory()
    validate(config)
    for warning in ignored_key_warnings(config):
        logger.warning(warning)
    if config.training.tf32:
        torch.set_float32_matmul_precision("high")
    config = with_absolute_paths(config, launch_dir=launch_dir)
    modes = (config.mode, *config.then)
    sampling = sampling_request(config)  # refuses now what samplers could not do after a training
    if "sample_eval" in modes:
        sampling.given_texts()  # likewise: a broken line in them is found before a training
    for mode in modes:
        MODES[mode](config)
    logger.info("Everything is in %s", os.getcwd())


@hydra.main(version_base=None, config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run(config, launch_dir=hydra.utils.get_original_cwd())
    except USER_ERRORS as error:
        # One line says it; HYDRA_FULL_ERROR=1 shows the rest.
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        logger.error("%s", explained(error))
        sys.exit(1)
    except Interrupted as stop:
        logger.warning("%s; the same command goes on from here", stop)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        logger.warning("Stopped by Ctrl-C; what is written stays")
        sys.exit(128 + signal.SIGINT)
    except Exception:
        logger.error("An error of the program, not of what you typed: please report what follows")
        raise
    finally:
        leave_process_group()


def explained(error: BaseException) -> str:
    """What an error says, in one line, and what helps against it."""
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {str(error).splitlines()[0]}"
    message = one_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        message += " A smaller loader.batch_size (auto finds one) or loader.eval_batch_size may fit"
    return message


if __name__ == "__main__":
    print_without_fail()
    main()
