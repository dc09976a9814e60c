"""The grid of `scripts.frontier`: what a command line asks for, one job for each point."""

import copy
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from configuration import ignored_key_warnings, validate
from configuration.paths import with_absolute_paths
from configuration.sampling_request import SamplingRequest, sampling_request
from configuration.training_request import plain
from scripts.composing import compose
from training.manifest import config_hash
from utils import get_logger

logger = get_logger(__name__)

SCORER = "eval.gen_ppl_eval_model_name_or_path"
# Under `sampling`, what tells how many texts are drawn and where they go, or nothing at all.
NO_SETTINGS = {"num_sample_batches", "logdir", "trace", "live", "noise_removal"}
# One for all points: the network is prepared once.
NO_AXES = {"sampling.compile"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One point that is asked for.

    Attributes:
        grid, settings, num_texts: see `evaluation.frontier.Point`, as is what `known` holds.
        config: with absolute paths.
        request: of that configuration.
        known: names and hashes of checkpoint and scorer.
        key: hex digits of everything that determines texts and scores.
    """

    grid: dict[str, Any]
    settings: dict[str, Any]
    num_texts: int
    config: DictConfig
    request: SamplingRequest
    known: dict[str, str | None]
    key: str


def plan(overrides: Sequence[str]) -> list[Job]:
    """Every point of the grid, the last axis first; all of them are valid.

    Raises:
        ValueError, HydraException: names the key, its value and what is allowed.
    """
    fixed, axes = split_grid(overrides)
    base = compose([*fixed, "mode=sample_eval", "then=[]"])
    allowed = settings_of(base).keys() - NO_AXES
    for key in axes:
        if key not in allowed:
            raise ValueError(
                f"{key}: allowed with several values are {', '.join(sorted(allowed))}"
            )
    if base.eval.gen_ppl_eval_model_name_or_path is None:
        raise ValueError(f"{SCORER}=null: allowed is a model that scores the texts")
    for warning in ignored_key_warnings(base):
        logger.warning(warning)
    configs = []
    for values in itertools.product(*axes.values()):
        config = copy.deepcopy(base)  # to compose each anew takes half a second
        for key, value in zip(axes, values, strict=True):
            OmegaConf.update(config, key, value)
        validate(config)
        configs.append(config)
    known = {}
    for name, key in (("checkpoint", "checkpoint_path"), ("scorer", SCORER.split(".")[1])):
        place = with_absolute_paths(base, launch_dir=os.getcwd()).eval[key]
        known |= {name: base.eval[key], f"{name}_hash": content_hash(place)}
    return [make_job(config, axes, known=known) for config in configs]


def split_grid(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """The overrides that have one value, and the values of each key that has several.

    Raises:
        ValueError: quotes what is no override.
    """
    fixed, axes, parser = [], {}, OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ValueError(f"{text}: allowed is key=value as Hydra reads it ({error})") from error
        if override.is_sweep_override():
            values = override.sweep_string_iterator()
            axes[override.key_or_group] = [
                parser.parse_override(f"key={value}").value() for value in values
            ]
        else:
            fixed.append(text)
    return fixed, axes


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The keys that tell how texts are drawn, with their values."""
    section = plain(config.sampling)
    settings = {f"sampling.{k}": v for k, v in section.items() if k not in NO_SETTINGS}
    return settings | {"algo.T": config.algo.T}


def make_job(config: DictConfig, axes: Mapping[str, Any], *, known: dict[str, Any]) -> Job:
    """The job of a valid configuration.

    Raises:
        ValueError, OSError: the sampler cannot do it, or there is something about its prompts.
    """
    settings = settings_of(config)
    config = with_absolute_paths(config, launch_dir=os.getcwd())
    request = sampling_request(config)
    texts = request.given_texts()
    num_texts = (len(texts) or request.batch_size) * request.num_sample_batches
    determining = {
        "checkpoint": known["checkpoint_hash"] or known["checkpoint"],
        "scorer": known["scorer_hash"] or known["scorer"],
        "settings": settings,
        "given": hashlib.sha256(repr(texts).encode()).hexdigest(),
        "num_texts": num_texts,
        "seed": config.seed,
        "precision": request.precision,
        "disable_ema": config.eval.disable_ema,
        "tokenizer": config.data.tokenizer_name_or_path,
        "block_size": config.block_size,
    } | {name: plain(config[name]) for name in ("algo", "model", "noise")}
    return Job(
        grid={key: settings[key] for key in axes},
        settings=settings,
        num_texts=num_texts,
        config=config,
        request=request,
        known=known,
        key=config_hash(determining),
    )


def content_hash(path: str) -> str | None:
    """Sixteen hex digits of a file, or of all files in a folder; None of a name on the Hub."""
    fs, root = fsspec.core.url_to_fs(path)
    if not fs.exists(root):
        return None
    digest = hashlib.sha256()
    for name in sorted(fs.find(root)):
        digest.update(name.removeprefix(root).encode())
        with fs.open(name, "rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    return digest.hexdigest()[:16]
