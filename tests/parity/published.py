"""Checks of `hub/*` (logits of published directories) and `lightning/*` (likelihoods)."""

import math
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from checkpointing.loading import load_weights
from checkpointing.weights import read_weights
from configuration import resolvers
from corpora.tokenization import load_tokenizer
from diffusion import Diffusion
from losses.forward_process import FULL
from losses.objectives import masked_mean
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from modes.starting_weights import load_model
from tests.parity.rows import Golden, Row, absolute, load_golden, relative

LOGITS, LOSSES = 2e-5, 1e-5  # the tolerances of the golden files' README
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = ("hidden_size", "cond_dim", "n_blocks", "n_heads", "length")


@torch.no_grad()
def hub_rows(path: Path) -> Iterator[Row]:
    """Logits of a Hub-format directory's weights in our network."""
    weights = read_weights(str(path))
    expected = safetensors.torch.load_file(path / "expected.safetensors")
    module = nn.Module()
    module.backbone = hub_network(weights.hub_config)
    load_weights(module, weights, use_ema=True)
    x, pattern = expected["xt"], AttentionPattern.FULL
    if weights.hub_config["cross_attn"]:
        x, pattern = torch.cat((x, expected["x0"]), dim=1), AttentionPattern.BLOCK_DIFFUSION
    logits = module.eval().backbone(x, pattern=pattern)
    name = f"{path.parent.name}/{path.name}"
    yield Row(name, "logits", absolute(logits, expected["logits"]), LOGITS)


def hub_network(hub_config: dict) -> DIT:
    """A network of the sizes in a `config.json`."""
    sizes = {key: hub_config[key] for key in ("vocab_size", "cond_dim", "n_blocks", "n_heads")}
    block_size = hub_config["block_size"] or hub_config["model_length"]
    return DIT(DITConfig(**sizes, hidden_size=hub_config["hidden_dim"], block_size=block_size))


def lightning_overrides(path: Path, golden: Golden) -> list[str]:
    """What a user types to evaluate a golden checkpoint."""
    return [
        *golden.meta["overrides"],
        *(f"model.{size}={golden.meta[size]}" for size in SIZES),
        f"data.tokenizer_name_or_path={golden.meta['tokenizer']}",
        f"eval.checkpoint_path={path}",
        "trainer.accelerator=cpu",
        "mode=ppl_eval",
    ]


def golden_config(overrides: list[str]) -> DictConfig:
    """The project's configuration with overrides."""
    resolvers.register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose("config", overrides)


@torch.no_grad()
def lightning_rows(path: Path) -> Iterator[Row]:
    """Likelihood by an original checkpoint: of every token for ar, else the mean over the seeds."""
    golden = load_golden(path.with_suffix(".expected.safetensors"))
    config = golden_config(lightning_overrides(path, golden))
    model = load_model(config, load_tokenizer(golden.meta["tokenizer"]))
    name = f"{path.parent.name}/{path.name}"
    x_0 = golden["x0"]
    mask = model.loss_mask(torch.ones_like(x_0), is_training=False)
    if model.is_ar:
        losses = model.token_losses(x_0, interval=FULL)
        yield Row(name, "losses", relative(losses * mask, golden["nlls"]), LOSSES)
        mean = masked_mean(losses, mask=mask)
        yield Row(name, "mean loss", abs(mean.item() - golden.meta["nll"]), LOSSES)
        return
    count = golden.meta["num_seeds"]
    means = [seeded_nelbo(model, x_0, mask=mask, seed=seed) for seed in range(count)]
    standard_error = golden.meta["nelbo_std_over_seeds"] / math.sqrt(count)
    difference = abs(sum(means) / count - golden.meta["nelbo_mean"])
    yield Row(name, f"NELBO, mean of {count} seeds", difference, 3 * standard_error)


def seeded_nelbo(model: Diffusion, x_0: Tensor, *, mask: Tensor, seed: int) -> float:
    """The mean NELBO of the rows x_0 (B, N) under one draw of noise."""
    torch.manual_seed(seed)
    return masked_mean(model.token_losses(x_0, interval=FULL), mask=mask).item()
