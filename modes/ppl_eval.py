"""Likelihood of a trained model on a validation set (`mode=ppl_eval`)."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from checkpointing.weights import read_weights
from configuration.data_request import data_request
from configuration.likelihood_request import estimator_of
from configuration.training_request import plain, trainer_request
from dataloader import get_dataloaders
from evaluation.report import print_table
from modes.starting_weights import load_model, tokenizer_of
from training.manifest import config_hash
from training.progress import PassProgress
from training.trainer import build_trainer
from utils import absolute_path, get_logger, json_text, write_text

logger = get_logger(__name__)

Z_95 = 1.96  # standard errors on either side


def ppl_eval(config: DictConfig) -> str:
    """Likelihood of the validation set; prints a table and writes a JSON file.

    Returns:
        The path of the JSON file: `eval.results_path`, or ppl_eval.json in the run directory.
    """
    data, estimator = data_request(config), estimator_of(config)
    trainer = build_trainer(trainer_request(config))
    weights = read_weights(config.eval.checkpoint_path)
    tokenizer = tokenizer_of(config, weights)
    model = load_model(config, tokenizer, weights)
    del weights
    model.estimator = estimator
    settings, num_passes = {"estimator": "nll"}, 1
    if not model.has_exact_nll:
        if message := estimator.stand_in(config.block_size):
            logger.warning("%s", message)
        settings = estimator.settings(config.block_size)
        num_passes = estimator.num_passes(config.block_size)
    if num_passes > 1:
        trainer.callbacks.append(PassProgress(num_passes))
    _, loader = get_dataloaders(
        data,
        tokenizer,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        skip_train=True,
    )
    L.seed_everything(config.seed, verbose=False)
    (metrics,) = trainer.validate(model, loader, verbose=False)
    results = with_errors(metrics) | settings | {"passes_per_batch": num_passes}
    results["num_tokens"] = int(metrics["val/tokens"])
    results["num_rows"] = int(metrics["val/rows"])
    results |= {k: v for k, v in metrics.items() if k.startswith("valid_var")}
    results["data"] = data.valid
    results["checkpoint"] = config.eval.checkpoint_path
    results["config_hash"] = config_hash(plain(config))
    path = absolute_path(config.eval.results_path or "ppl_eval.json")
    if trainer.is_global_zero:
        write_text(path, json_text(results, indent=2) + "\n")
        known = {name: value for name, value in results.items() if value is not None}
        print_table(f"Likelihood of {data.valid}", known)
    return path


def with_errors(metrics: Mapping[str, float]) -> dict[str, Any]:
    """nll, perplexity and bits per token, each with its error: None where that is unknown.

    The intervals are those of 95 %, by the standard error over rows.
    """
    found = {name: metrics[name] for name in ("val/nll", "val/nll_se", "val/nll_mc_se")}
    found |= {name: metrics[name] for name in ("val/ppl", "val/bpd")}
    nll, error = found["val/nll"], found["val/nll_se"]
    low, high = (torch.tensor(nll + z * error, dtype=torch.float64) for z in (-Z_95, Z_95))
    found["val/ppl_95"] = (low.exp().item(), high.exp().item())  # infinity, no OverflowError
    found["val/bpd_95"] = (low.item() / math.log(2), high.item() / math.log(2))
    unknown = ("val/nll_se", "val/ppl_95", "val/bpd_95") if math.isnan(error) else ()
    if math.isnan(found["val/nll_mc_se"]):
        unknown = (*unknown, "val/nll_mc_se")
    return found | dict.fromkeys(unknown)
