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
