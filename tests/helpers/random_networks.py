"""Denoisers with random weights everywhere, and samplers of them."""

import math
from collections import Counter

import torch

from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from sampling.base import blank_canvas
from sampling.semi_ar import SemiAutoregressiveSampler

V, MASK, BOS = 23, 22, 0
CPU = torch.device("cpu")


def network(*, block_size: int, parameterization: str = "subs", seed: int = 0) -> Denoiser:
    """A small network with random weights everywhere, so that every path carries signal."""
    torch.manual_seed(seed)
    config = DITConfig(
        vocab_size=V,
        block_size=block_size,
        hidden_size=32,
        cond_dim=8,
        n_blocks=2,
        n_heads=2,
        adaln=parameterization == "subs",
        attn_backend="sdpa",
    )
    backbone = DIT(config).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Denoiser(backbone=backbone, parameterization=parameterization, mask_index=MASK)


def canvas(batch_size: int, length: int) -> torch.Tensor:
    return blank_canvas(batch_size, length, bos_index=BOS, mask_index=MASK, device=CPU)


def semi(block_size: int, **settings) -> SemiAutoregressiveSampler:
    return SemiAutoregressiveSampler(
        block_size=block_size,
        mask_index=MASK,
        pad_index=BOS,
        pattern=AttentionPattern.BLOCK_CAUSAL,
        **settings,
    )


def generators(rows, *, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + row) for row in rows]


def plain_entropy(tokens: list[int]) -> float:
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())
