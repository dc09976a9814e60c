"""Likelihood of data under our model, averaged over tokens and processes; entropy of a text."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection


class NLL(Metric):
    """Mean negative log-likelihood (or its bound) per token, in nats."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.total: Tensor
        self.num_tokens: Tensor
        self.num_rows: Tensor

    def update(self, losses: Tensor, mask: Tensor) -> None:
        """Add per-token losses (B, N) where the 0/1 mask (B, N) is 1."""
        self.total += (losses.detach() * mask).sum(dtype=torch.float64)
        self.num_tokens += mask.sum(dtype=torch.float64)
        self.num_rows += len(losses)

    def compute(self) -> Tensor:
        return (self.total / self.num_tokens).float()


class BPD(NLL):
    """The same in bits per token (bits per dimension)."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)


class Perplexity(NLL):
    """e to the mean negative log-likelihood."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class NumTokens(NLL):
    """How many tokens the mean runs over."""

    def compute(self) -> Tensor:
        return self.num_tokens


class NumRows(NLL):
    """How many rows they stand in."""

    def compute(self) -> Tensor:
        return self.num_rows


class _RowMoments(Metric):
    """Sums over rows of nats and of tokens, and of their products."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        # nats, tokens, nats^2, nats x tokens, tokens^2, rows; and the variance of the nats.
        self.add_state("sums", torch.zeros(7, dtype=torch.float64), dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, losses: Tensor, mask: Tensor, variance: Tensor | None = None) -> None:
        """Add per-token losses (B, N) where the 0/1 mask (B, N) is 1.

        Args:
            losses, mask: see above.
            variance: of each row's sum, from what was drawn to estimate it, (B,); None: unknown.
        """
        nats = (losses.detach() * mask).sum(dim=1, dtype=torch.float64)
        tokens = mask.sum(dim=1, dtype=torch.float64)
        if variance is None:
            variance = torch.full_like(nats, torch.nan)
        columns = (
            nats, tokens, nats**2, nats * tokens, tokens**2, torch.ones_like(nats), variance
        )  # fmt: skip
        self.sums += torch.stack(columns).sum(dim=1)


class StandardError(_RowMoments):
    """Of the mean per token, as rows drawn from the same source would spread it; in nats.

    Rows count as independent. The mean is a ratio of sums, nats by tokens, and its error the one of
    a ratio: the residuals of a row are its nats less the mean times its tokens.
    """

    def compute(self) -> Tensor:
        nats, tokens, nats2, both, tokens2, rows, _ = self.sums
        mean = nats / tokens
        squares = nats2 - 2 * mean * both + mean**2 * tokens2
        return (squares.clamp(min=0) * rows / (rows - 1)).sqrt() / tokens  # NaN of a single row


class MonteCarloError(_RowMoments):
    """The part of it that comes from what was drawn for the same rows; NaN where unknown."""

    def compute(self) -> Tensor:
        return self.sums[-1].sqrt() / self.sums[1]


def error_metrics(prefix: str) -> MetricCollection:
    """Standard error and Monte Carlo error of the nll, under a prefix; they share their sums."""
    errors = {"nll_se": StandardError(), "nll_mc_se": MonteCarloError()}
    return MetricCollection(errors, prefix=prefix)


def likelihood_metrics(prefix: str) -> MetricCollection:
    """nll, bpd, ppl, tokens and rows under a prefix; they share their sums."""
    metrics = {
        "nll": NLL(),
        "bpd": BPD(),
        "ppl": Perplexity(),
        "tokens": NumTokens(),
        "rows": NumRows(),
    }
    return MetricCollection(metrics, prefix=prefix)


def token_entropy(tokens: Tensor) -> float:
    """Entropy in nats of the histogram of a 1-D tensor of token ids."""
    counts = tokens.unique(return_counts=True)[1].double()
    p = counts / counts.sum()
    return max(0.0, float(-(p * p.log()).sum()))  # a single symbol would have -0.0
