"""Likelihood of a trained model on a validation set (`mode=ppl_eval`)."""

from typing import Any

import lightning as L
from omegaconf import DictConfig

from configuration.data_request import data_request
from configuration.training_request import plain, trainer_request
from dataloader import get_dataloaders, get_tokenizer
from evaluation.report import print_table
from modes.starting_weights import load_model
from training.manifest import config_hash
from training.trainer import build_trainer
from utils import absolute_path, json_text, write_text


def ppl_eval(config: DictConfig) -> str:
    """Likelihood of the validation set; prints a table and writes a JSON file.

    Returns:
        The path of the JSON file: `eval.results_path`, or ppl_eval.json in the run directory.
    """
    data, trainer = data_request(config), build_trainer(trainer_request(config))
    tokenizer = get_tokenizer(data)
    model = load_model(config, tokenizer)
    _, loader = get_dataloaders(
        data,
        tokenizer,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        skip_train=True,
    )
    L.seed_everything(config.seed, verbose=False)
    (metrics,) = trainer.validate(model, loader, verbose=False)
    results: dict[str, Any] = {k: metrics[k] for k in ("val/nll", "val/ppl", "val/bpd")}
    results["num_tokens"] = int(metrics["val/tokens"])
    results["num_rows"] = int(metrics["val/rows"])
    results |= {k: v for k, v in metrics.items() if k.startswith("valid_var")}
    results["data"] = data.valid
    results["checkpoint"] = config.eval.checkpoint_path
    results["config_hash"] = config_hash(plain(config))
    path = absolute_path(config.eval.results_path or "ppl_eval.json")
    if trainer.is_global_zero:
        write_text(path, json_text(results, indent=2) + "\n")
        print_table(f"Likelihood of {data.valid}", results)
    return path
