"""One `attend` for every backend: PyTorch's SDPA everywhere, FlexAttention where it pays."""

import functools
import logging
import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from models.kernels.sliced_attention import sliced_attention

from .compiling import MAX_GRAPHS, allow_graphs
from .masks import AttentionPattern, dense_mask, flex_block_mask, is_unrestricted

logger = logging.getLogger(__name__)

# `flash_attn` is what the original's configs say. It names no library here: like `auto`, it asks
# for the best backend that this device and pattern have.
BACKENDS = ("auto", "flash_attn", "flex", "sdpa")


def resolve_backend(backend: str, *, pattern: AttentionPattern, device: torch.device) -> str:
    """The backend that will run: 'sdpa' or 'flex'.

    Args:
        backend: one of `BACKENDS`.
        pattern: FlexAttention pays only where a mask has structure SDPA's kernels do not know.
        device: where the tensors are.

    Raises:
        ValueError: if the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"model.attn_backend={backend}: allowed are {', '.join(BACKENDS)}")
    if backend in ("flex", "sdpa"):
        return backend
    has_structure = pattern is AttentionPattern.BLOCK_DIFFUSION
    return "flex" if has_structure and device.type == "cuda" else "sdpa"


class _CompiledFlexAttention:
    """FlexAttention as one fused kernel, compiled for each shape.

    Uncompiled it holds every score in memory, and that is what `torch.compile` goes back to at its
    limit of graphs. Here a shape beyond the limit is refused.
    """

    def __init__(self):
        # With fullgraph the limit is an error.
        self._call = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: BlockMask) -> Tensor | None:
        """(B, H, T, d), or None where there is no room for one more graph."""
        if torch.compiler.is_compiling():  # a part of somebody's larger graph
            return flex_attention(q, k, v, block_mask=mask)
        is_training = torch.is_grad_enabled() and q.requires_grad
        shape = (q.shape, k.shape[2], q.dtype, is_training)
        if shape in self._refused:
            return None
        if shape not in self._seen:
            self._seen.add(shape)
            allow_graphs()
            logger.info(
                "Compiling FlexAttention for %s rows, %s queries, %s keys and %s",
                len(q), q.shape[2], k.shape[2], "training" if is_training else "inference",
            )  # fmt: skip
        try:
            return self._call(q, k, v, block_mask=mask)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            if not self._refused:
                logger.warning(
                    "FlexAttention was compiled for %s shapes, which is the limit; SDPA, slower, "
                    "computes the same for every other one. Fewer sizes of batches help",
                    MAX_GRAPHS,
                )
            self._refused.add(shape)
            return None


@functools.cache
def _compiled_flex_attention() -> _CompiledFlexAttention:
    return _CompiledFlexAttention()


@functools.cache
def _cpu_computes_flex() -> bool:
    """Whether FlexAttention's kernel for CPUs is right here; says so once where it is not.

    With vectors shorter than those of AVX512 the kernel of torch 2.13 reads scores that it has not
    written: short rows came out wrong, or as NaN.
    """
    is_right = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not is_right:
        logger.warning(
            "model.attn_backend=flex: FlexAttention is wrong on CPUs without AVX512; SDPA computes "
            "the same instead"
        )
    return is_right


def _flex(q: Tensor, k: Tensor, v: Tensor, *, pattern: AttentionPattern, block_size: int) -> Tensor:
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        raise ValueError(
            "model.attn_backend=flex cannot train on the CPU: FlexAttention has no backward pass "
            "there; use model.attn_backend=auto or sdpa"
        )
    if q.device.type == "cpu" and not _cpu_computes_flex():
        return _sdpa(q, k, v, pattern=pattern, block_size=block_size)
    mask = flex_block_mask(
        pattern, q_len=q.shape[2], kv_len=k.shape[2], block_size=block_size, device=q.device
    )
    out = _compiled_flex_attention()(q, k, v, mask=mask)
    return _sdpa(q, k, v, pattern=pattern, block_size=block_size) if out is None else out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, pattern: AttentionPattern, block_size: int) -> Tensor:
    q_len, kv_len = q.shape[2], k.shape[2]
    if _suits_slices(q, k, pattern=pattern):
        return sliced_attention(q, k, v, pattern=pattern, block_size=block_size)
    if pattern is AttentionPattern.CAUSAL and q_len == kv_len:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = dense_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# Fewer queries than this are not worth slicing.
_MANY_QUERIES = 128
# In float32 it takes so many keys; SDPA is as fast where it knows the pattern without a mask.
_MANY_KEYS = {AttentionPattern.BLOCK_DIFFUSION: 512, AttentionPattern.BLOCK_CAUSAL: 1024}


def _suits_slices(q: Tensor, k: Tensor, *, pattern: AttentionPattern) -> bool:
    """Whether `sliced_attention` is the faster one; measured in benchmarks/README.md."""
    if q.device.type != "cpu" or q.shape[2] < _MANY_QUERIES:
        return False
    return q.dtype == torch.bfloat16 or k.shape[2] >= _MANY_KEYS.get(pattern, math.inf)


def _suits_products(q: Tensor, *, pattern: AttentionPattern) -> bool:
    """Whether `_few_queries` is the faster one; what trains needs SDPA's gradients."""
    is_cpu_inference = q.device.type == "cpu" and not torch.is_grad_enabled()
    is_pair = pattern is AttentionPattern.BLOCK_DIFFUSION
    is_few = q.shape[2] < _MANY_QUERIES and not is_pair
    return is_cpu_inference and q.dtype == torch.bfloat16 and is_few


def _few_queries(q: Tensor, k: Tensor, v: Tensor, *, own: Tensor | None) -> Tensor:
    """A block of queries, mostly against a long cache, for bf16 on a CPU.

    SDPA's kernel there repacks all keys in every call, which takes twice as long as this. The
    scores pass through bf16, whose rounding the weights have anyway.

    Args:
        q, k, v: (B, H, T, d) and (B, H, S, d).
        own: which of the last T keys each query sees, (T, T) bool; None: all. It sees all others.
    """
    shape, num = q.shape, q.shape[2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B H, T or S, d)
    scores = torch.bmm(q * shape[-1] ** -0.5, k.transpose(1, 2))  # (B H, T, S)
    if own is not None:
        scores[..., -num:].masked_fill_(~own, -torch.inf)
    return torch.bmm(scores.softmax(dim=-1), v).view(shape)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: AttentionPattern, block_size: int, backend: str
) -> Tensor:
    """softmax(q k^T / sqrt d) v under a pattern.

    Args:
        q: queries (B, H, T, d); `masks.first_query` says of which positions.
        k, v: keys and values (B, H, S, d), S >= T; S = T without a KV cache.
        pattern: who sees whom; `BLOCK_DIFFUSION` expects S = 2N, and T = S or N.
        block_size: L.
        backend: one of `BACKENDS`.

    Returns:
        (B, H, T, d).

    Raises:
        ValueError: unknown backend, or a backend that cannot run what is asked of it.
    """
    chosen = resolve_backend(backend, pattern=pattern, device=q.device)
    q_len, kv_len = q.shape[2], k.shape[2]
    if is_unrestricted(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size):
        # Nothing to skip, on either backend. FlexAttention would compile anew for each length of a
        # growing cache.
        if _suits_slices(q, k, pattern=AttentionPattern.FULL):
            return sliced_attention(
                q, k, v, pattern=AttentionPattern.FULL, block_size=block_size
            )
        if _suits_products(q, pattern=pattern):
            return _few_queries(q, k, v, own=None)
        return F.scaled_dot_product_attention(q, k, v)
    if chosen == "sdpa" and _suits_products(q, pattern=pattern):
        mask = dense_mask(
            pattern, q_len=q_len, kv_len=kv_len, block_size=block_size, device=q.device
        )
        return _few_queries(q, k, v, own=mask[:, -q_len:])
    run = _flex if chosen == "flex" else _sdpa
    return run(q, k, v, pattern=pattern, block_size=block_size)
