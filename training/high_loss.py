"""Warns of a batch that a model finds far less likely than noise, and names its worst row."""

import math
from collections.abc import Callable

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from losses.objectives import masked_mean
from utils import get_logger

logger = get_logger(__name__)

# A uniform distribution has log V nats per token, and so has a model before its training.
TIMES_UNIFORM = 3
_SHOWN = 32  # tokens


class HighLoss(L.Callback):
    """One warning per run where the mean loss of a batch is above three times log V.

    Such a loss comes of tokens that the model must not see (a mask in the documents), of another
    tokenizer than in training, or of a training that diverges.

    A single masked token weighs up to 1/t, and t may be as small as the interval's lower end. So
    much is allowed on top: no noise of a small batch gives the warning, a large one has no slack.

    As with `NanGuard`, no step waits for the GPU. The first such batch is kept on the device and
    read where a run waits anyway: at logged steps and at the end of a validation.

    Args:
        vocab_size: V.
        decode: token ids to text.
    """

    def __init__(self, *, vocab_size: int, decode: Callable[[list[int]], str]):
        self._uniform = math.log(vocab_size)
        self._decode = decode
        # Whether there was one, in training or not, batch, row, means of both, then token ids.
        self._found: Tensor | None = None
        self._has_warned = False
        self._last_step = 0

    def see(
        self,
        losses: Tensor,
        *,
        mask: Tensor,
        x_0: Tensor,
        low: float,
        batch_idx: int,
        is_training: bool,
    ) -> None:
        """Keeps the batch in mind if it is the first one too unlikely; waits for nothing.

        Args:
            losses: per token, (B, N), or (B, N - 1) for ar.
            mask: 0/1, of the same shape: what the mean runs over.
            x_0: token ids (B, N).
            low: the smallest t that noise is drawn with.
            batch_idx: the batch's number in its epoch.
            is_training: or a validation.
        """
        if self._has_warned:
            return
        losses = losses.detach()
        mean = masked_mean(losses, mask=mask)
        worst, row = ((losses * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).max(dim=0)
        limit = self._uniform * (TIMES_UNIFORM + 1 / (low * mask.sum()))
        constants = [torch.full_like(mean, number) for number in (1, is_training, batch_idx)]
        ids = x_0.index_select(0, row[None])[0, :_SHOWN]
        ids = F.pad(ids, (0, _SHOWN - len(ids)), value=-1)
        seen = torch.cat([torch.stack([*constants, row, mean, worst]).double(), ids.double()])
        if self._found is None:
            self._found = torch.zeros_like(seen)
        is_first = ~(mean <= limit) & (self._found[0] == 0)
        self._found = torch.where(is_first, seen, self._found)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        step, interval = trainer.global_step, trainer.log_every_n_steps
        if step != self._last_step and interval and step % interval == 0:
            self._report(trainer, pl_module)
        self._last_step = step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._report(trainer, pl_module)

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warns if any process has seen such a batch; a collective operation."""
        if self._has_warned:
            return
        found = self._found
        if found is None:  # this process had no batch
            found = torch.zeros(6 + _SHOWN, dtype=torch.float64, device=pl_module.device)
        of_ranks = trainer.strategy.all_gather(found).reshape(-1, len(found)).tolist()
        for rank, (is_found, is_training, batch, row, mean, worst, *ids) in enumerate(of_ranks):
            if is_found:
                self._has_warned = True
                logger.warning(
                    "The loss of batch %d of the %s in process %d is %.1f nats per token, above %d "
                    "times that of a uniform distribution (%.1f). Its worst row, number %d, has "
                    "%.1f and begins with %r. Is the tokenizer that of the weights, and is the "
                    "text what it should be?",
                    batch, "training" if is_training else "validation", rank, mean, TIMES_UNIFORM,
                    self._uniform, row, worst, self._decode([int(i) for i in ids if i >= 0]),
                )  # fmt: skip
                return
