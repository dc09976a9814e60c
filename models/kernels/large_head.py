"""`chunked_head` for a GPU: few large chunks, and all that is done to one in a pass over it.

Chunks that fit a CPU's cache would be a hundred there, with forty small kernels each. The three
matrix products are left as they are. What lies between them, logits to sums and logits to their
gradient, are two functions that a compiler fuses: each reads the logits once or twice and writes no
float32 copy of them.

All chunks have the same width, a multiple of 128: the last one is filled up with tokens without
probability. So a product never has an odd number of columns, which GPUs are slow at, and two graphs
do for all chunks.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import get_logger

logger = get_logger(__name__)

# Logits at a time. In bf16 0.5 GB, and as much again for their gradient.
MAX_LOGITS_COMPILED = 2**28
# Uncompiled, four or five float32 copies live at once: 1.2 GB.
MAX_LOGITS = 2**26
# Stands for minus infinity where arithmetic with infinities would make NaN.
NEG_INFINITY = -1e6
_STEP = 128


def add_to_sums(
    logits: Tensor, columns: Tensor, target: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """What logits (n, c) of some more tokens make of both sums so far, each (n,).

    `columns` (n,) is where the token asked for stands, outside of [0, c) if it is another chunk's.
    """
    logits = logits.to(log_sum.dtype)
    is_target = torch.arange(logits.shape[1], device=logits.device) == columns[:, None]
    target = target + torch.where(is_target, logits, 0.0).sum(dim=-1)
    return target, torch.logaddexp(log_sum, logits.logsumexp(dim=-1))


def logits_gradient(
    logits: Tensor, columns: Tensor, log_sum: Tensor, grad_target: Tensor, grad_log_sum: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of logits (n, c), in their precision, and its sum over the rows (c,).

    d log_sum / d logit is the probability, d target / d logit is 1 at the target.
    """
    p = (logits.to(log_sum.dtype) - log_sum[:, None]).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == columns[:, None]
    grad = p * grad_log_sum[:, None] + torch.where(is_target, grad_target[:, None], 0.0)
    return grad.to(logits.dtype), grad.sum(dim=0)


class Form(NamedTuple):
    """How the elementwise part is computed, and how many logits it is given at a time."""

    add_to_sums: Callable[..., tuple[Tensor, Tensor]]
    logits_gradient: Callable[..., tuple[Tensor, Tensor]]
    max_logits: int

    def chunk(self, rows: int, vocab_size: int) -> int:
        """Tokens at a time: an even part of them, halved as often as needed, in steps of 128.

        Few widths come up whatever the number of rows is, and each is compiled once.
        """
        parts = 1
        while rows * vocab_size > parts * self.max_logits and vocab_size > parts * _STEP:
            parts *= 2
        return -(-vocab_size // (parts * _STEP)) * _STEP


PLAIN = Form(add_to_sums, logits_gradient, MAX_LOGITS)


def form_for(device: torch.device, *, is_compiled: bool) -> Form | None:
    """What suits a device; None for a CPU, which has a form of its own."""
    if device.type == "cpu":
        return None
    return compiled_form() if is_compiled else PLAIN


@functools.cache
def compiled_form(backend: str = "inductor") -> Form:
    """The functions compiled where they are first used."""
    functions = (_compiled(function, backend) for function in (add_to_sums, logits_gradient))
    return Form(*functions, MAX_LOGITS_COMPILED)


def _compiled(function: Callable, backend: str) -> Callable:
    """A compiled function that goes on as it is where compiling fails, which is said once."""
    fast, works = torch.compile(function, fullgraph=True, backend=backend), True

    @functools.wraps(function)
    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal works
        if works:
            try:
                return fast(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler, or the one behind it, may raise
                works = False
                reason = str(error).strip().split("\n")[0]
                logger.warning("The output layer is not compiled and slower for it: %s", reason)
        return function(*args)

    return call


class LargeTargetScores(torch.autograd.Function):
    """The two numbers of `chunked_head.TargetScores`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        excluded: int,
        chunk: int,
        form: Form,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        target = torch.zeros(len(x), dtype=dtype, device=x.device)
        log_sum = torch.full_like(target, -torch.inf)
        for start, matrix, offset in _parts(weight, bias, x.dtype, excluded=excluded, chunk=chunk):
            logits = F.linear(x, matrix, offset)
            target, log_sum = form.add_to_sums(logits, targets - start, target, log_sum)
        ctx.save_for_backward(x, weight, bias, targets, log_sum)
        ctx.excluded, ctx.chunk, ctx.form = excluded, chunk, form
        return target, log_sum

    @staticmethod
    def backward(ctx: Any, grad_target: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, log_sum = ctx.saved_tensors
        grad_x = torch.zeros(x.shape, dtype=log_sum.dtype, device=x.device)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        parts = _parts(weight, bias, x.dtype, excluded=ctx.excluded, chunk=ctx.chunk)
        for start, matrix, offset in parts:
            grad, of_bias = ctx.form.logits_gradient(
                F.linear(x, matrix, offset), targets - start, log_sum, grad_target, grad_log_sum
            )
            grad_x += torch.mm(grad, matrix)
            here = slice(start, min(start + ctx.chunk, len(weight)))
            width = here.stop - here.start
            grad_weight[here] = torch.mm(grad.t(), x)[:width]
            grad_bias[here] = of_bias[:width]
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None


def _parts(
    weight: Tensor, bias: Tensor, dtype: torch.dtype, *, excluded: int, chunk: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First token, weights (c, D) and biases (c,) of each chunk, as wide as all others."""
    vocab_size = len(weight)
    has_none = torch.arange(vocab_size, device=bias.device) == excluded
    bias = bias.masked_fill(has_none, NEG_INFINITY).to(dtype)
    for start in range(0, vocab_size, chunk):
        matrix, offset = weight[start : start + chunk].to(dtype), bias[start : start + chunk]
        if missing := chunk - len(matrix):
            matrix = F.pad(matrix, (0, 0, 0, missing))
            offset = F.pad(offset, (0, missing), value=NEG_INFINITY)
        yield start, matrix, offset
