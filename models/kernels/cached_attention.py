"""Attention of a few new tokens over a KV cache, on a CPU that multiplies bf16: our own kernel.

Rotation, writing to the cache and attention are one pass over the buffers, which stay where they
are. The kernel, `cached_attention.cpp`, is compiled for this machine when a process first samples
in bf16, which takes a second. Where there is no compiler, or the CPU lacks AVX512-BF16, samplers go
through `attention.attend` as before.
"""

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.masks import AttentionPattern, dense_mask, is_unrestricted

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-strict-aliasing"),
    *("-shared", "-fPIC"),
)
# Longer passes, of a prompt, have more to gain from skipping what their pattern forbids.
MAX_NEW_TOKENS = 127


@functools.cache
def kernel(head_dim: int) -> Callable[..., None] | None:
    """The kernel for heads of this size, or None where it cannot be had."""
    if head_dim % 32 or not SOURCE.exists():  # as in an exported model's code
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        logger.info("sampling is slower without a C++ compiler: g++, c++ or what CXX names")
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "cached_attention.so")
        command = [*shlex.split(compiler), *_FLAGS, f"-DHEAD_DIM={head_dim}", str(SOURCE)]
        try:
            subprocess.run(
                [*command, "-o", library], check=True, capture_output=True, text=True, timeout=60
            )
            function = ctypes.CDLL(library).cached_attention  # stays when the file is gone
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            logger.info("sampling is slower without a kernel for this CPU: %s", reason.strip())
            return None
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 8
    function.restype = None
    return function


def can_attend_cached(*, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel for heads of this size, on this machine."""
    return device.type == "cpu" and dtype == torch.bfloat16 and kernel(head_dim) is not None


def cached_attention(
    qkv: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    new: slice,
    cos: Tensor,
    sin: Tensor,
    pattern: AttentionPattern,
    block_size: int,
) -> Tensor:
    """Rotate T new queries and keys, write the keys and values, and attend to all there are.

    Args:
        qkv: queries, keys and values of the new tokens, bf16 (B, T, 3 D).
        keys, values: the cache's, bf16 (B, H, S, d), as `KVCache.reserve` gives them.
        new: where among the S tokens the new ones go.
        cos, sin: as `Rotary` makes them.
        pattern: what the new tokens see of one another; they see all others.
        block_size: L.

    Returns:
        What all heads read, side by side, bf16 (B, T, D).
    """
    num_rows, num_new, _ = qkv.shape
    _, num_heads, seen, head_dim = keys.shape
    own = None
    if not is_unrestricted(pattern, q_len=num_new, kv_len=seen, block_size=block_size):
        mask = dense_mask(
            pattern, q_len=num_new, kv_len=seen, block_size=block_size, device=qkv.device
        )
        own = mask[:, -num_new:].contiguous()
    # Without gaps, as a linear layer makes them; the kernel knows no other form.
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    out = qkv.new_empty(num_rows, num_new, num_heads * head_dim)
    tensors = (qkv, keys, values, out, cos, sin, own)
    kernel(head_dim)(
        *(None if x is None else x.data_ptr() for x in tensors),
        num_rows,
        num_heads,
        num_new,
        new.start,
        seen,
        keys.stride(1),
        0 if len(cos) == 1 else cos.stride(0),
        torch.get_num_threads(),
    )
    return out
