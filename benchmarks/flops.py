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
    dim, n_layers, block = config.hidden_size, config.n_blocks, config.block_size
    head = 2 * dim * config.vocab_size
    if algo == "ar":
        seen = (length - 1) * length / 2
        layers = n_layers * _layer(length - 1, dim=dim, seen=seen)
        return ForwardFlops(layers + head * (length - 1), 0.0)
    head *= (length - 1) * (interval.low + interval.high) / 2
    num_blocks = length // block
    if algo != "bd3lm" or num_blocks == 1:
        return ForwardFlops(n_layers * _layer(length, dim=dim, seen=length**2) + head, 0.0)
    pairs = block**2 * num_blocks / 2
    seen_by_noisy = length * block + pairs * (num_blocks - 1)
    noisy = n_layers * _layer(length, dim=dim, seen=seen_by_noisy)
    clean = (n_layers - 1) * _layer(length, dim=dim, seen=pairs * (num_blocks + 1))
    return ForwardFlops(noisy + head, clean + 4 * length * dim**2)


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
