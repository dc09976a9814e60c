"""What a loss needs of the output layer, without ever holding the logits of all positions.

Cross-entropy and score entropy both come from two numbers per position: the logit of the right
token, and the log of the sum of all exponentials. They are computed for a part of the vocabulary at
a time, in the forward pass and again in the backward pass. So each row of the weights' gradient is
written once.

This is the form for a CPU, in chunks for its cache; a GPU takes that of `large_head`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .large_head import NEG_INFINITY, LargeTargetScores, form_for

# Logits at a time: small enough for memory that is used again and again, see `keep_freed_memory`.
MAX_LOGITS = 2**22


class TargetScores(NamedTuple):
    """Of n positions, each (n,) float32.

    Attributes:
        target: logit of the token asked for.
        log_sum: log of the sum of e^logit over all tokens but the excluded one.
    """

    target: Tensor
    log_sum: Tensor

    @property
    def log_p(self) -> Tensor:
        """log p of the token asked for, (n,)."""
        return self.target - self.log_sum


class _TargetScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        excluded: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        target = torch.zeros(len(x), dtype=dtype, device=x.device)
        log_sum = torch.full_like(target, -torch.inf)
        for tokens in _chunks(len(weight), chunk):
            logits = _logits(x, weight, bias, tokens=tokens, excluded=excluded)
            column, is_here = _columns(targets, tokens=tokens)
            target += logits.gather(-1, column)[:, 0] * is_here
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(dim=-1))
        ctx.save_for_backward(x, weight, bias, targets, log_sum)
        ctx.excluded, ctx.chunk = excluded, chunk
        return target, log_sum

    @staticmethod
    def backward(ctx: Any, grad_target: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, log_sum = ctx.saved_tensors
        grad_x = torch.zeros(x.shape, dtype=log_sum.dtype, device=x.device)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        for tokens in _chunks(len(weight), ctx.chunk):
            # d log_sum / d logit is the probability, d target / d logit is 1 at the target.
            grad = _logits(x, weight, bias, tokens=tokens, excluded=ctx.excluded)
            grad = grad.sub_(log_sum[:, None]).exp_().mul_(grad_log_sum[:, None])
            column, is_here = _columns(targets, tokens=tokens)
            grad.scatter_add_(-1, column, (grad_target * is_here)[:, None])
            grad_bias[tokens] = grad.sum(dim=0)
            grad = grad.to(x.dtype)
            grad_x += torch.mm(grad, weight[tokens].to(x.dtype))
            grad_weight[tokens] = torch.mm(grad.t(), x)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None


def _chunks(vocab_size: int, chunk: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk, vocab_size)) for i in range(0, vocab_size, chunk))


def _columns(targets: Tensor, *, tokens: slice) -> tuple[Tensor, Tensor]:
    """Column of each target among these tokens, (n, 1), and whether it is one of them, (n,)."""
    is_here = (targets >= tokens.start) & (targets < tokens.stop)
    return (targets - tokens.start).where(is_here, 0)[:, None], is_here


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor, *, tokens: slice, excluded: int
) -> Tensor:
    """Logits of some tokens (n, c), at least float32, with no weight on the excluded token."""
    matrix, bias = weight[tokens].to(x.dtype), bias[tokens].to(x.dtype)
    logits = torch.nn.functional.linear(x, matrix, bias)
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    if tokens.start <= excluded < tokens.stop:
        logits[:, excluded - tokens.start].fill_(NEG_INFINITY)
    return logits


@torch.compiler.disable  # traced, torch 2.11 computes wrong gradients of it
def target_scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    targets: Tensor,
    excluded: int,
    chunk: int | None = None,
    is_compiled: bool = False,
) -> TargetScores:
    """Logit of a token and log-sum of all, for each position.

    Args:
        x: what the output projection is given, (n, D), in the precision of its product.
        weight, bias: (V, D) and (V,).
        targets: ids (n,) int64.
        excluded: id of a token that has no probability: the mask.
        chunk: tokens of the vocabulary at a time; no result depends on it. None: as many as suit
            the device.
        is_compiled: on a GPU, compile what is not a matrix product.
    """
    if len(x) == 0:  # zero times the sums keeps the gradients defined
        empty = x.sum(dim=-1) + 0 * (weight.sum() + bias.sum())
        return TargetScores(empty.float(), empty.float())
    with torch.autocast(x.device.type, enabled=False):
        form = form_for(x.device, is_compiled=is_compiled)
        if form is None:
            chunk = chunk or max(512, MAX_LOGITS // len(x))
            return chunked_scores(x, weight, bias, targets, excluded=excluded, chunk=chunk)
        chunk = chunk or form.chunk(len(x), len(weight))
        scores = LargeTargetScores.apply(x, weight, bias, targets, excluded, chunk, form)
        return TargetScores(*scores)


def chunked_scores(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *, excluded: int, chunk: int
) -> TargetScores:
    """`target_scores` in the form for a CPU, wherever the tensors are."""
    return TargetScores(*_TargetScores.apply(x, weight, bias, targets, excluded, chunk))


def called_target_scores(
    x: Tensor, layer: nn.Module, *, targets: Tensor, excluded: int, rows: int = 1024
) -> TargetScores:
    """The same of a layer that is called: one with an adapter, quantized, hooked (`is_plain`).

    Args:
        x: what the output projection is given, (n, D).
        layer: (n, D) -> logits (n, V).
        targets, excluded: see `target_scores`.
        rows: positions at a time, whose logits the backward pass computes anew; no result depends
            on it.
    """

    def scores(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = layer(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        column = torch.arange(logits.shape[-1], device=logits.device) == excluded
        logits = logits.masked_fill(column, NEG_INFINITY)
        return logits.gather(-1, targets[:, None])[:, 0], logits.logsumexp(dim=-1)

    if len(x) <= rows:
        return TargetScores(*scores(x, targets))
    parts = [
        checkpoint(scores, *part, use_reentrant=False)
        for part in zip(x.split(rows), targets.split(rows), strict=True)
    ]
    return TargetScores(*(torch.cat(column) for column in zip(*parts, strict=True)))
