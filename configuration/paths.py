"""Paths of the configuration, which are those of where the command was typed."""

import copy

from omegaconf import DictConfig, OmegaConf

from utils import absolute_path, file_exists

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


def with_absolute_paths(config: DictConfig, *, launch_dir: str) -> DictConfig:
    """The configuration with its relative paths as seen from the directory of the command."""
    found = copy.deepcopy(config)
    for key in PATH_KEYS + PATH_OR_NAME_KEYS:
        value = OmegaConf.select(found, key)
        if not isinstance(value, str) or not value:
            continue
        path = absolute_path(value, base=launch_dir)
        if key in PATH_KEYS or file_exists(path):
            OmegaConf.update(found, key, path)
    return found
