"""Attention on a CPU over slices of the mask, so that what nobody sees is hardly computed.

A slice is a run of queries and the few runs of keys that any of them may see. Of the (2N)^2 pairs
of training on [x_t ; x_0] a quarter is visible, and the slices hold little more. Their matrix
products are plain ones: in bf16 oneDNN's are twice as fast as the CPU's fused kernel. Nothing of
the size of the scores outlives a slice: the backward pass computes the probabilities anew.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.masks import AttentionPattern, first_query, may_attend

# Queries per slice: fewer waste less at the border of the mask, more make better products.
MIN_QUERIES, MAX_QUERIES = 64, 256


@dataclass(frozen=True)
class Slice:
    """Queries `start` to `end`, and the runs of keys that they may see.

    Attributes:
        start, end: of the queries.
        keys: start and end of each run.
        hidden: which of the last keys each query may not see, (queries, keys) bool; None: all.
    """

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    hidden: Tensor | None


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what an evaluation has cached must serve a training too
def slices_of(
    pattern: AttentionPattern, *, q_len: int, kv_len: int, block_size: int, device: torch.device
) -> tuple[Slice, ...]:
    """The slices of a pattern.

    Args:
        pattern: who sees whom.
        q_len, kv_len: numbers of queries and keys; `masks.first_query` says which they are.
        block_size: L.
        device: of the masks.
    """
    is_pair = pattern is AttentionPattern.BLOCK_DIFFUSION
    length = kv_len // 2 if is_pair else kv_len
    size = min(MAX_QUERIES, max(MIN_QUERIES, length // 16))
    first = first_query(pattern, q_len=q_len, kv_len=kv_len)
    slices, start = [], first
    while start < first + q_len:
        # A slice lies in one half.
        border = length if start < length else first + q_len
        end = min(start + size, border, first + q_len)
        keys = _visible_runs(pattern, start, end, length=length, block_size=block_size)
        index = torch.cat([torch.arange(*run, device=device) for run in keys])
        queries = torch.arange(start, end, device=device)[:, None]
        visible = may_attend(queries, index, pattern=pattern, length=length, block_size=block_size)
        num_clear = int(visible.all(dim=0).long().cumprod(dim=0).sum())
        hidden = None if num_clear == len(index) else ~visible[:, num_clear:]
        slices.append(Slice(start - first, end - first, keys, hidden))
        start = end
    return tuple(slices)


def _visible_runs(
    pattern: AttentionPattern, start: int, end: int, *, length: int, block_size: int
) -> tuple[tuple[int, int], ...]:
    """The runs of keys that positions start..end-1 of one half may see, empty ones left out."""
    if pattern is AttentionPattern.FULL:
        runs = [(0, length)]
    elif pattern is AttentionPattern.CAUSAL:
        runs = [(0, end)]
    else:
        offset = length if start >= length else 0  # of a clean query
        last_block = (end - 1 - offset) // block_size
        end_of_block = min(length, (last_block + 1) * block_size)
        if pattern is AttentionPattern.BLOCK_CAUSAL:
            runs = [(0, end_of_block)]
        elif offset:
            runs = [(length, length + end_of_block)]
        else:
            own_blocks = (start // block_size * block_size, end_of_block)
            runs = [(length, length + last_block * block_size), own_blocks]
    return tuple(run for run in runs if run[0] < run[1])


def _take(x: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The positions of some runs of (B, H, S, d), heads flattened: (B H, n, d) without gaps."""
    parts = [x[:, :, start:end] for start, end in runs]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).flatten(0, 1).contiguous()


def _probabilities(q: Tensor, k: Tensor, *, hidden: Tensor | None) -> Tensor:
    """(B H, queries, keys) of scaled queries and keys (B H, n, d)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if hidden is not None:
        scores[:, :, -hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
    return scores.softmax(dim=-1)


class _SlicedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt d) v, slice by slice."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slices: tuple[Slice, ...]
    ) -> Tensor:
        # Slices are taken often, so here the tokens of a head lie side by side.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        # The heads of a token side by side, as the next product takes them: that needs no copy.
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        scale = q.shape[-1] ** -0.5
        for s in slices:
            p = _probabilities(
                _take(q, ((s.start, s.end),)) * scale, _take(k, s.keys), hidden=s.hidden
            )
            heads = torch.bmm(p, _take(v, s.keys))
            out[:, :, s.start : s.end] = heads.view_as(out[:, :, s.start : s.end])
        ctx.save_for_backward(q, k, v, out)
        ctx.slices = slices
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        sums_dtype = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Many slices add to a key's gradient.
        grad_k = torch.zeros(k.shape, dtype=sums_dtype, device=k.device)
        grad_v = torch.zeros_like(grad_k)
        for s in ctx.slices:
            run = ((s.start, s.end),)
            q_s, k_s, v_s = _take(q, run) * scale, _take(k, s.keys), _take(v, s.keys)
            grad_s, out_s = _take(grad, run), _take(out, run)
            p = _probabilities(q_s, k_s, hidden=s.hidden)
            _add(grad_v, torch.bmm(p.transpose(1, 2), grad_s), s.keys)
            # d softmax: p (dp - sum p dp), and that sum is the product of grad and output
            inner = (grad_s.to(sums_dtype) * out_s).sum(dim=-1, keepdim=True)
            grad_scores = torch.bmm(grad_s, v_s.transpose(1, 2)).sub_(inner).mul_(p)
            _add(grad_k, torch.bmm(grad_scores.transpose(1, 2), q_s), s.keys)
            part = grad_q[:, :, s.start : s.end]
            part.copy_((torch.bmm(grad_scores, k_s) * scale).view_as(part))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _add(total: Tensor, part: Tensor, runs: tuple[tuple[int, int], ...]) -> None:
    """Add (B H, n, d) to the runs of (B, H, S, d), in place."""
    part, taken = part.view(*total.shape[:2], *part.shape[1:]), 0
    for start, end in runs:
        total[:, :, start:end] += part[:, :, taken : taken + end - start]
        taken += end - start


@torch.compiler.disable  # one operator to a compiler: it would not know the cache of slices
def sliced_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: AttentionPattern, block_size: int
) -> Tensor:
    """softmax(q k^T / sqrt d) v under a pattern.

    Args:
        q: queries (B, H, T, d), see `masks.first_query`.
        k, v: keys and values (B, H, S, d).
        pattern: who sees whom.
        block_size: L.

    Returns:
        (B, H, T, d). In bf16 scores and probabilities are rounded to bf16.
    """
    slices = slices_of(
        pattern, q_len=q.shape[2], kv_len=k.shape[2], block_size=block_size, device=q.device
    )
    with torch.autocast(q.device.type, enabled=False):
        return _SlicedAttention.apply(q, k, v, slices)
