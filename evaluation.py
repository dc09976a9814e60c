"""Evaluation of a trained model: likelihood (`ppl_eval`) and samples (`sample_eval`)."""

import csv
import dataclasses
import hashlib
import io
import json
import os
from typing import Any

import fsspec
import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from dataloader import get_dataloaders, get_tokenizer
from diffusion import Diffusion
from metrics import token_entropy
from report import print_table
from sampling.options import SMALL_VOCABULARY, SamplingOptions
from training.checkpointing import load_weights, read_weights
from utils import (
    absolute_path,
    file_exists,
    get_logger,
    lightning_precision,
    resolve_device,
    write_text,
)

logger = get_logger(__name__)

SAMPLE_COLUMNS = ("gen_ppl", "gen_nfes", "gen_entropy", "gen_lengths", "samples", "seed")


def load_model(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> Diffusion:
    """The model with the weights of `eval.checkpoint_path`, averaged unless `eval.disable_ema`."""
    weights = read_weights(config.eval.checkpoint_path)
    model = Diffusion(config, tokenizer)
    load_weights(model, weights, use_ema=not config.eval.disable_ema)
    return model.eval()


def config_hash(config: DictConfig) -> str:
    """Sixteen hex digits of the resolved configuration."""
    resolved = json.dumps(OmegaConf.to_container(config, resolve=True), sort_keys=True)
    return hashlib.sha256(resolved.encode()).hexdigest()[:16]


def ppl_eval(config: DictConfig, trainer: L.Trainer) -> str:
    """Likelihood of the validation set; prints a table and writes a JSON file.

    Returns:
        The path of the JSON file: `eval.results_path`, or ppl_eval.json in the run directory.
    """
    tokenizer = get_tokenizer(config)
    model = load_model(config, tokenizer)
    _, loader = get_dataloaders(
        config,
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
    results["data"] = config.data.valid
    results["checkpoint"] = config.eval.checkpoint_path
    results["config_hash"] = config_hash(config)
    path = absolute_path(config.eval.results_path or "ppl_eval.json", base=os.getcwd())
    if trainer.is_global_zero:
        write_text(path, json.dumps(results, indent=2) + "\n")
        print_table(f"Likelihood of {config.data.valid}", results)
    return path


def sampling_options(config: DictConfig) -> SamplingOptions:
    """The keys under `sampling` and `algo.T` as the samplers take them.

    The entropy rule is switched off, with a warning, for tokenizers of a small vocabulary: it is
    made for GPT-2's, and would reject every text of, say, letters.
    """
    sampling = config.sampling
    return SamplingOptions(
        first_hitting=sampling.first_hitting,
        num_steps=config.algo.T,
        kv_cache=sampling.kv_cache,
        nucleus_p=sampling.nucleus_p,
        nucleus_rule=sampling.nucleus_rule,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        tokens_per_step=sampling.tokens_per_step,
        confidence_threshold=sampling.confidence_threshold,
        var_length=sampling.var_length,
        stop_on_eos=sampling.stop_on_eos,
        min_entropy=sampling.min_entropy,
    )


def suit_vocabulary(options: SamplingOptions, *, vocab_size: int) -> SamplingOptions:
    """The options without the entropy rule where the vocabulary is too small for it."""
    if options.min_entropy is None or vocab_size >= SMALL_VOCABULARY:
        return options
    logger.warning(
        "sampling.min_entropy=%s is off: it is made for large vocabularies, and ordinary text of "
        "%d symbols may have less entropy; sampling.min_entropy=null says so without a warning",
        options.min_entropy,
        vocab_size,
    )
    return dataclasses.replace(options, min_entropy=None)


def sample_eval(config: DictConfig) -> str | None:
    """Draw `sampling.num_sample_batches` batches, print them and write one CSV row per sample.

    Returns:
        The path of the CSV file in `sampling.logdir`; None on all processes but the first, which
        alone draws samples (under srun every one of them would draw the same).
    """
    if rank_zero_only.rank != 0:
        return None
    options = sampling_options(config)
    tokenizer = get_tokenizer(config)
    device = resolve_device(config.trainer.accelerator)
    model = load_model(config, tokenizer).to(device)
    options = suit_vocabulary(options, vocab_size=model.backbone.config.vocab_size)
    is_bf16 = lightning_precision(config.trainer.precision).startswith("bf16")
    batch_size = config.loader.eval_batch_size
    rows = []
    for batch in track(range(config.sampling.num_sample_batches), description="Sampling"):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
            output = model.generate(
                num_samples=batch_size,
                options=options,
                seed=config.seed,
                first_row=batch * batch_size,
                max_retries=config.sampling.max_retries,
            )
        for tokens, length, nfe in zip(
            output.tokens, output.lengths, output.num_forward_passes, strict=True
        ):
            text = tokenizer.decode(tokens[:length])
            Console().print(Panel(text, title=f"sample {len(rows) + 1}"), markup=False)
            rows.append(
                {
                    "gen_nfes": int(nfe),
                    "gen_entropy": token_entropy(tokens[:length]),
                    "gen_lengths": int(length),
                    "samples": text,
                    "seed": config.seed,
                }
            )
    return _append_samples(absolute_path(config.sampling.logdir, base=os.getcwd()), rows)


def _append_samples(logdir: str, rows: list[dict[str, Any]]) -> str:
    path = f"{logdir}/samples.csv"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SAMPLE_COLUMNS)
    if file_exists(path):
        with fsspec.open(path, "r", newline="", encoding="utf-8") as file:
            text.write(file.read())
    else:
        writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    logger.info("%d samples are in %s", len(rows), path)
    return path
