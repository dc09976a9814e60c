"""The arithmetic that an objective needs, and how much of it a machine can do.

Model FLOPs count matrix products (2 per multiply-add) and the non-zero area of attention, and only
what the loss depends on, whoever computes it and however. For one row of N tokens, D hidden size,
V vocabulary, l layers, K = N/L blocks:

    layer of T tokens      24 T D^2 + 4 D A      A: pairs (query, key) that see each other
    head                   2 D V M               M: positions that carry loss
    ar                     T = N - 1, A = T (T + 1) / 2, M = T
    mdlm, sedd             T = N, A = N^2, M = the masks, (N - 1) (low + high) / 2 expected
    bd3lm, noisy half      T = N, A = N L + L^2 K (K - 1) / 2, M as in mdlm
    bd3lm, clean half      T = N, A = L^2 K (K + 1) / 2 in all layers but the last, of which keys
                           and values alone are needed, 4 N D^2; nothing where K = 1

A backward pass is two forward passes. Embedding, norms, conditioning, softmax and optimizer are
left out. A search for the clipped range needs the clean half once and the noisy half per range.
"""

import time
from dataclasses import dataclass

import torch

from losses.forward_process import ClipInterval
from models.dit import DITConfig


@dataclass(frozen=True)
class ForwardFlops:
    """Of one row and forward pass; `clean` does not depend on the noise."""

    noisy: float
    clean: float

    @property
    def total(self) -> float:
        return self.noisy + self.clean


def forward_flops(
    config: DITConfig, *, algo: str, length: int, interval: ClipInterval
) -> ForwardFlops:
    """The formula above.

    Args:
        config: sizes of the network.
        algo: ar, mdlm, sedd or bd3lm.
        length: N.
        interval: the range of t, with p = t.
    """
    dim, n_layers = config.hidden_size, config.n_blocks
    head = 2 * dim * config.vocab_size * scored_tokens(algo=algo, length=length, interval=interval)
    seen = visible_pairs(algo=algo, length=length, block_size=config.block_size)
    tokens = length - 1 if algo == "ar" else length
    noisy = n_layers * _layer(tokens, dim=dim, seen=seen.noisy)
    if not seen.clean:
        return ForwardFlops(noisy + head, 0.0)
    clean = (n_layers - 1) * _layer(length, dim=dim, seen=seen.clean)
    return ForwardFlops(noisy + head, clean + 4 * length * dim**2)


def scored_tokens(*, algo: str, length: int, interval: ClipInterval) -> float:
    """M of the formula above, of one row."""
    return (length - 1) * (1.0 if algo == "ar" else (interval.low + interval.high) / 2)


@dataclass(frozen=True)
class VisiblePairs:
    """A of the formula above: of one row, layer and half; without a clean half 0."""

    noisy: float
    clean: float


def visible_pairs(*, algo: str, length: int, block_size: int) -> VisiblePairs:
    """Pairs of a query and a key that see each other."""
    num_blocks = length // block_size
    if algo == "ar":
        return VisiblePairs((length - 1) * length / 2, 0.0)
    if algo != "bd3lm" or num_blocks == 1:
        return VisiblePairs(length**2, 0.0)
    pairs = block_size**2 * num_blocks / 2
    return VisiblePairs(length * block_size + pairs * (num_blocks - 1), pairs * (num_blocks + 1))


def _layer(tokens: int, *, dim: int, seen: float) -> float:
    return 24 * tokens * dim**2 + 4 * dim * seen


def matmul_peak(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of one large square matrix product, the best of several tries; of a smaller one too.

    Args:
        size: of the matrices; None: large for the device.
    """
    largest, tries = (8192, 20) if device.type == "cuda" else (4096, 3)
    size = size or largest
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
