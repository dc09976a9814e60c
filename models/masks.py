"""Which query may see which key: the four attention patterns, as predicates and as masks.

A pattern is a short function of query and key indices (`may_attend`). Everything else here turns
that one function into what a backend wants: a dense boolean mask for SDPA, a `BlockMask` for
FlexAttention, or nothing at all where the pattern forbids nothing.
"""

import enum
import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class AttentionPattern(enum.Enum):
    """Who sees whom in one forward pass."""

    FULL = "full"  # mdlm, sedd: everybody sees everybody
    CAUSAL = "causal"  # ar: a token sees itself and what came before
    BLOCK_CAUSAL = "block_causal"  # sampling: a block sees itself and the blocks before it
    BLOCK_DIFFUSION = "block_diffusion"  # training on [x_t ; x_0], the paper's three-part mask


def block_diagonal(q: Tensor, k: Tensor, *, length: int, block_size: int) -> Tensor:
    """Same block and same half: a noisy block denoises itself, a clean block encodes itself."""
    same_half = q // length == k // length  # not a comparison of booleans: Inductor fails on it
    return same_half & (q % length // block_size == k % length // block_size)


def offset_block_causal(q: Tensor, k: Tensor, *, length: int, block_size: int) -> Tensor:
    """A noisy query sees the clean blocks strictly before its own."""
    earlier = q % length // block_size > k % length // block_size
    return (q < length) & (k >= length) & earlier


def clean_block_causal(q: Tensor, k: Tensor, *, length: int, block_size: int) -> Tensor:
    """A clean query sees the clean blocks up to and including its own."""
    not_later = q % length // block_size >= k % length // block_size
    return (q >= length) & (k >= length) & not_later


def may_attend(
    q: Tensor, k: Tensor, *, pattern: AttentionPattern, length: int, block_size: int
) -> Tensor:
    """Whether query index `q` may see key index `k` (paper section 3.1 and appendix B.6).

    Args:
        q: integer query indices; for `BLOCK_DIFFUSION` x_t is below `length`, x_0 from there on.
        k: integer key indices, broadcastable against `q`.
        pattern: the attention pattern.
        length: clean length N (used by `BLOCK_DIFFUSION` alone).
        block_size: L.

    Returns:
        A boolean tensor of the broadcast shape.
    """
    if pattern is AttentionPattern.FULL:
        return (q >= 0) & (k >= 0)
    if pattern is AttentionPattern.CAUSAL:
        return q >= k
    if pattern is AttentionPattern.BLOCK_CAUSAL:
        return q // block_size >= k // block_size
    parts = (block_diagonal, offset_block_causal, clean_block_causal)
    seen = [part(q, k, length=length, block_size=block_size) for part in parts]
    return seen[0] | seen[1] | seen[2]


def is_unrestricted(
    pattern: AttentionPattern, *, q_len: int, kv_len: int, block_size: int
) -> bool:
    """True where the pattern forbids nothing, so that no mask has to exist.

    The queries are the last `q_len` of `kv_len` positions. That covers the sampler's hot path, one
    block of queries (or one token, for `CAUSAL`) against the KV cache and itself, whatever the
    length of the cache: a mask is never built there.
    """
    if pattern is AttentionPattern.FULL:
        return True
    if pattern is AttentionPattern.CAUSAL:
        return q_len == 1
    if pattern is AttentionPattern.BLOCK_CAUSAL:
        return (kv_len - q_len) // block_size == (kv_len - 1) // block_size
    return False


def first_query(pattern: AttentionPattern, *, q_len: int, kv_len: int) -> int:
    """Which position the first query is: queries are the last ones, those of a KV cache's pass.

    Except for `BLOCK_DIFFUSION`: there they are the first, all 2N or the noisy half alone.
    """
    return 0 if pattern is AttentionPattern.BLOCK_DIFFUSION else kv_len - q_len


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # an evaluation may ask first, and a training of the same process then
def dense_mask(
    pattern: AttentionPattern, *, q_len: int, kv_len: int, block_size: int, device: torch.device
) -> Tensor:
    """The boolean mask of SDPA, (q_len, kv_len), True where a query may see a key.

    Which positions the queries are says `first_query`.
    """
    first = first_query(pattern, q_len=q_len, kv_len=kv_len)
    q = torch.arange(first, first + q_len, device=device)[:, None]
    k = torch.arange(kv_len, device=device)[None, :]
    return may_attend(q, k, pattern=pattern, length=kv_len // 2, block_size=block_size)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def flex_block_mask(
    pattern: AttentionPattern, *, q_len: int, kv_len: int, block_size: int, device: torch.device
) -> BlockMask:
    """FlexAttention's block-sparse mask of the same pattern; lengths need not be aligned."""
    offset = first_query(pattern, q_len=q_len, kv_len=kv_len)
    length = kv_len // 2

    def mask_mod(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return may_attend(q + offset, k, pattern=pattern, length=length, block_size=block_size)

    return create_block_mask(mask_mod, None, None, q_len, kv_len, device=device)
