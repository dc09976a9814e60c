"""Slow, plain twins of the fast code, and small networks that carry signal."""

import pytest
import torch
from torch import Tensor

from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.kv_cache import KVCache
from models.masks import AttentionPattern
from noise_schedule import get_noise


def sees(i: int, j: int, *, pattern: AttentionPattern, length: int, block_size: int) -> bool:
    """Whether query i may see key j: the contract's sentence, word for word."""
    if pattern is AttentionPattern.FULL:
        return True
    if pattern is AttentionPattern.CAUSAL:
        return j <= i
    if pattern is AttentionPattern.BLOCK_CAUSAL:
        return i // block_size >= j // block_size
    i_noisy, j_noisy = i < length, j < length
    i_block, j_block = (i % length) // block_size, (j % length) // block_size
    return (
        (i_block == j_block and i_noisy == j_noisy)
        or (i_noisy and not j_noisy and i_block > j_block)
        or (not i_noisy and not j_noisy and i_block >= j_block)
    )


def brute_force_mask(
    pattern: AttentionPattern, *, q_len: int, kv_len: int, block_size: int
) -> Tensor:
    """The boolean mask (q_len, kv_len), entry by entry.

    The queries are the last positions, of `BLOCK_DIFFUSION` the first.
    """
    length = kv_len // 2
    first = 0 if pattern is AttentionPattern.BLOCK_DIFFUSION else kv_len - q_len
    rows = [
        [sees(i, j, pattern=pattern, length=length, block_size=block_size) for j in range(kv_len)]
        for i in range(first, first + q_len)
    ]
    return torch.tensor(rows)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt d) v with every score in memory, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask.to(q.device), float("-inf")).softmax(dim=-1) @ v


def random_qkv(
    *, q_len: int, kv_len: int, heads: int = 2, dim: int = 16, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries, keys and values for two rows."""
    g = generator(seed)
    return tuple(
        torch.randn(2, heads, n, dim, generator=g).to(device) for n in (q_len, kv_len, kv_len)
    )


def small_dit(*, seed: int = 0, **changes) -> DIT:
    """A two-layer network in which no weight is zero, in evaluation mode.

    Fresh weights would not do: zero gates and a zero output layer hide every error behind them.
    """
    sizes = {
        "vocab_size": 23, "block_size": 4, "hidden_size": 32, "cond_dim": 8, "n_blocks": 2,
        "n_heads": 2, "dropout": 0.1, "attn_backend": "sdpa",
    }  # fmt: skip
    network = DIT(DITConfig(**(sizes | changes)))
    g = generator(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            is_norm = "norm" in name
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.2 * noise)
    return network.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How likely so large a chi-square is by chance; 0 where something impossible was drawn."""
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum()
    freedom = torch.tensor(max(int(possible.sum()) - 1, 1) / 2)
    return torch.special.gammaincc(freedom, statistic.float() / 2).item()


def random_tokens(*shape: int, vocab_size: int = 22, seed: int = 0) -> Tensor:
    """Token ids without the mask token, which is the last id of `small_dit`."""
    return torch.randint(vocab_size, shape, generator=generator(seed))


def cache_for(network: DIT, *, batch_size: int, capacity: int, dtype=torch.float32) -> KVCache:
    """An empty KV cache of the network's sizes."""
    return KVCache(
        n_layers=network.config.n_blocks,
        batch_size=batch_size,
        n_heads=network.config.n_heads,
        capacity=capacity,
        head_dim=network.config.head_dim,
        device=network.vocab_embed.embedding.device,
        dtype=dtype,
    )


# --- denoisers over `small_dit` ---

P = AttentionPattern
V, MASK = 23, 22  # of `small_dit`
SIGMA_MAX = get_noise("loglinear").sigma_max
# (algo, parameterization, pattern, time conditioning)
DIFFUSION = [
    ("bd3lm", "subs", P.BLOCK_DIFFUSION, False),
    ("mdlm", "subs", P.FULL, False),
    ("sedd", "sedd", P.FULL, True),
]
ALGOS = pytest.mark.parametrize(
    ("parameterization", "pattern", "time_conditioning"),
    [algo[1:] for algo in DIFFUSION],
    ids=[algo[0] for algo in DIFFUSION],
)


def denoiser_of(parameterization: str, *, time_conditioning: bool = False, **changes) -> Denoiser:
    return Denoiser(
        backbone=small_dit(**changes),
        parameterization=parameterization,
        mask_index=MASK,
        time_conditioning=time_conditioning,
    )
