"""Checks of `backbone_*` (logits, probabilities, KV cache) and `loss_*` (losses, gradients)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from losses.forward_process import ClipInterval, noise_values, q_xt
from losses.objectives import ar_token_losses, diffusion_token_losses, masked_mean
from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.kv_cache import KVCache
from models.masks import AttentionPattern
from noise_schedule import get_noise
from tests.parity.rows import (
    Golden,
    Row,
    absolute,
    count_different,
    load_golden,
    relative,
    relative_to_largest,
)

LOGITS, LOSSES, GRADIENTS = 2e-5, 1e-5, 1e-4  # the tolerances of the golden files' README
# Entries below stand for minus infinity in the golden probabilities.
MINUS_INFINITY = -1e5


def golden_denoiser(golden: Golden, *, backend: str, device: str = "cpu") -> Denoiser:
    """The network with the file's sizes and weights, dropout off."""
    meta = golden.meta
    sizes = ("vocab_size", "block_size", "hidden_size", "cond_dim", "n_blocks", "n_heads", "adaln")
    network = DIT(DITConfig(**{size: meta[size] for size in sizes}, attn_backend=backend))
    prefix = "backbone."
    weights = {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}
    network.load_state_dict(weights)
    return Denoiser(
        backbone=network.eval().to(device),
        parameterization=meta["parameterization"],
        mask_index=meta["mask_index"],
        time_conditioning=meta["time_conditioning"],
    )


def golden_pattern(golden: Golden) -> AttentionPattern:
    """The attention pattern of training."""
    if golden.meta["parameterization"] == "ar":
        return AttentionPattern.CAUSAL
    if golden.meta["cross_attn"]:
        return AttentionPattern.BLOCK_DIFFUSION
    return AttentionPattern.FULL


def golden_input(golden: Golden) -> Tensor:
    """What the network reads: [x_t ; x_0] for block diffusion, x_0 for ar, x_t otherwise."""
    pattern = golden_pattern(golden)
    if pattern is AttentionPattern.BLOCK_DIFFUSION:
        return torch.cat((golden["xt"], golden["x0"]), dim=1)
    return golden["x0"] if pattern is AttentionPattern.CAUSAL else golden["xt"]


def probability_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of finite entries; infinite where minus infinities disagree."""
    finite = expected > MINUS_INFINITY
    if not torch.equal(found > MINUS_INFINITY, finite):
        return float("inf")
    return absolute(found[finite], expected[finite])


@torch.no_grad()
def backbone_rows(path: Path, *, backends: Sequence[str] = ("sdpa", "flex")) -> Iterator[Row]:
    """Logits and probabilities on each backend, and block by block over a KV cache."""
    golden = load_golden(path)
    for backend in backends:
        denoiser = golden_denoiser(golden, backend=backend)
        x, pattern = golden_input(golden), golden_pattern(golden)
        logits = denoiser.logits(x, golden.tensors.get("sigma"), pattern=pattern)
        yield Row(path.name, f"logits, {backend}", absolute(logits, golden["logits"]), LOGITS)

        name = "log_probs" if "log_probs" in golden.tensors else "log_score"
        found = denoiser(x, golden.tensors.get("sigma_in"), pattern=pattern)
        difference = probability_difference(found, golden[name])
        yield Row(path.name, f"{name}, {backend}", difference, LOGITS)

        if "sample_indices" in golden.tensors:
            sample = golden["sample_indices"]
            logits = denoiser.logits(sample, pattern=AttentionPattern.BLOCK_CAUSAL)
            difference = absolute(logits, golden["sample_logits"])
            yield Row(path.name, f"sampling logits, {backend}", difference, LOGITS)
    yield from cached_rows(golden)


@torch.no_grad()
def cached_rows(golden: Golden) -> Iterator[Row]:
    """The same logits piece by piece: ar token by token, a block-causal prefix block by block."""
    if golden_pattern(golden) is AttentionPattern.CAUSAL:
        x, expected, step = golden["x0"], golden["logits"], 1
        pattern = AttentionPattern.CAUSAL
    elif "sample_indices" in golden.tensors:
        x, expected = golden["sample_indices"], golden["sample_logits"]
        pattern, step = AttentionPattern.BLOCK_CAUSAL, golden.meta["block_size"]
    else:
        return
    denoiser = golden_denoiser(golden, backend="sdpa")
    config = denoiser.backbone.config
    cache = KVCache(
        n_layers=config.n_blocks,
        batch_size=x.shape[0],
        n_heads=config.n_heads,
        capacity=x.shape[1],
        head_dim=config.head_dim,
        device=x.device,
        dtype=torch.float32,
    )
    pieces = []
    for piece in x.split(step, dim=1):
        pieces.append(denoiser.logits(piece, pattern=pattern, kv_cache=cache))
        cache.commit(step)
    difference = absolute(torch.cat(pieces, dim=1), expected)
    yield Row(golden.file, "logits, KV cache", difference, LOGITS)


def loss_rows(path: Path, *, backend: str = "sdpa") -> Iterator[Row]:
    """x_t, per-token losses, both reductions, and the gradients of the training loss."""
    golden = load_golden(path)
    denoiser = golden_denoiser(golden, backend=backend)
    if golden_pattern(golden) is AttentionPattern.CAUSAL:
        losses = ar_token_losses(denoiser, golden["x0"])
        attended = golden["attention_mask"][:, 1:]
    else:
        losses, forward = diffusion_losses(golden, denoiser)
        attended = golden["attention_mask"]
        yield from forward
    for mode in ("train", "eval"):
        mask = golden[f"{mode}_token_mask"]
        # The original's per-token losses are zero where there is no token.
        tokens = relative((losses * attended).detach(), golden[f"{mode}_nlls"] * attended)
        mean = relative(masked_mean(losses, mask=mask).detach()[None], golden[f"{mode}_loss"])
        yield Row(path.name, f"{mode} losses", max(tokens, mean), LOSSES)

    masked_mean(losses, mask=golden["train_token_mask"]).backward()
    parameters = dict(denoiser.backbone.named_parameters())
    prefix = "grad.backbone."
    differences = [
        relative_to_largest(parameters[name.removeprefix(prefix)].grad, expected)
        for name, expected in golden.tensors.items()
        if name.startswith(prefix)
    ]
    yield Row(path.name, f"gradients ({len(differences)})", max(differences), GRADIENTS)


def diffusion_losses(golden: Golden, denoiser: Denoiser) -> tuple[Tensor, list[Row]]:
    """Per-token losses (B, N) from the file's t and u, and the rows of the forward process."""
    meta, noise = golden.meta, get_noise("loglinear")
    values = noise_values(
        noise,
        golden["t"],
        interval=ClipInterval(meta["sampling_eps_min"], meta["sampling_eps_max"]),
        mdlm_loss_scale=meta["mdlm_loss_scale"],
    )
    x_t = q_xt(
        golden["x0"],
        u=golden["u"],
        move_chance=values.move_chance,
        mask_index=meta["mask_index"],
        ignore_bos=meta["ignore_bos"],
    )
    moved = relative(values.move_chance, golden["move_chance"])
    rows = [
        Row(golden.file, "move_chance", moved, LOSSES),
        Row(golden.file, "x_t (unequal tokens)", count_different(x_t, golden["xt"]), 0.0),
    ]
    losses = diffusion_token_losses(
        denoiser,
        golden["x0"],
        x_t=x_t,
        values=values,
        sigma_max=noise.sigma_max,
        pattern=golden_pattern(golden),
    )
    return losses, rows
