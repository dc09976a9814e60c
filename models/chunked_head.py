"""What a loss needs of the output layer, without ever holding the logits of all positions.

Cross-entropy and score entropy both come from two numbers per position: the logit of the right
token, and the log of the sum of all exponentials. They are computed for a few hundred positions at
a time, in the forward pass and again in the backward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Positions at a time. 50,000 float32 logits for each make 50 MB.
CHUNK = 256
# Stands for minus infinity where arithmetic with infinities would make NaN.
NEG_INFINITY = -1e6


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
        matrix = weight.to(x.dtype)
        target, log_sum = [], []
        for x_c, targets_c in zip(x.split(chunk), targets.split(chunk), strict=True):
            logits = _logits(x_c, matrix, bias, excluded=excluded)
            target.append(logits.gather(-1, targets_c[:, None])[:, 0])
            log_sum.append(logits.logsumexp(dim=-1))
        target, log_sum = torch.cat(target), torch.cat(log_sum)
        ctx.save_for_backward(x, weight, bias, targets, log_sum)
        ctx.excluded, ctx.chunk = excluded, chunk
        return target, log_sum

    @staticmethod
    def backward(ctx: Any, grad_target: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, log_sum = ctx.saved_tensors
        matrix = weight.to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for i in range(0, len(x), ctx.chunk):
            rows = slice(i, i + ctx.chunk)
            # d log_sum / d logit is the probability, d target / d logit is 1 at the target.
            grad = _logits(x[rows], matrix, bias, excluded=ctx.excluded)
            grad = grad.sub_(log_sum[rows, None]).exp_().mul_(grad_log_sum[rows, None])
            grad.scatter_add_(-1, targets[rows, None], grad_target[rows, None])
            grad_bias += grad.sum(dim=0)
            grad = grad.to(x.dtype)
            torch.mm(grad, matrix, out=grad_x[rows])
            grad_weight += torch.mm(grad.t(), x[rows])
        return grad_x, grad_weight, grad_bias, None, None, None


def _logits(x: Tensor, matrix: Tensor, bias: Tensor, *, excluded: int) -> Tensor:
    """Logits (n, V), at least float32, with no weight on the excluded token."""
    logits = torch.nn.functional.linear(x, matrix, bias.to(x.dtype))
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    logits[:, excluded] = NEG_INFINITY
    return logits


def target_scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    targets: Tensor,
    excluded: int,
    chunk: int = CHUNK,
) -> TargetScores:
    """Logit of a token and log-sum of all, for each position.

    Args:
        x: what the output projection is given, (n, D), in the precision of its product.
        weight, bias: (V, D) and (V,).
        targets: ids (n,) int64.
        excluded: id of a token that has no probability: the mask.
        chunk: positions at a time; no result depends on it.
    """
    if len(x) == 0:  # nothing to split; zero times the sums keeps the gradients defined
        empty = x.sum(dim=-1) + 0 * (weight.sum() + bias.sum())
        return TargetScores(empty.float(), empty.float())
    with torch.autocast(x.device.type, enabled=False):
        return TargetScores(*_TargetScores.apply(x, weight, bias, targets, excluded, chunk))
