"""What makes the CPU wait for a GPU: counted on the CPU, where the same operations run."""

from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import small_module
from tests.helpers.small_run import ALGOS
from training.callbacks import EMACallback
from training.nan_guard import NanGuard
from training.progress import PlainProgress, ProgressBar
from training.throughput import Throughput

# Reading a number (`item`, `float`, `bool`), and finding out how many elements a mask selects.
READS, SELECTIONS = "_local_scalar_dense", ("nonzero", "masked_select")


class Operations(TorchDispatchMode):
    """Counts the operations that wait; `index` does where an index is boolean."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in (READS, *SELECTIONS):
            self.seen[name] += 1
        elif name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen["nonzero"] += 1
        return function(*args, **(kwargs or {}))


class PerStep(L.Callback):
    """How often the whole of each step waited: batch, losses, optimizer and other callbacks."""

    def __init__(self, operations: Operations):
        self.operations = operations
        self.steps: list[Counter[str]] = []

    def on_train_batch_start(self, trainer, *_args):
        self.steps.append(Counter(self.operations.seen))

    @property
    def between(self) -> list[Counter[str]]:
        return [after - before for before, after in zip(self.steps, self.steps[1:], strict=False)]


def counted_steps(
    compose, folder: Path, *changes: str, progress: type[L.Callback] = ProgressBar
) -> list[Counter[str]]:
    """Of steps 0 to 6, with a logging interval of 4: numbers are read after step 3."""
    model = small_module.module(compose, folder, *changes)
    operations = Operations()
    count = PerStep(operations)
    callbacks = [count, progress(), EMACallback(0.9), NanGuard(str(folder)), Throughput()]
    trainer, _ = small_module.trainer(
        folder, callbacks=callbacks, steps=8, log_every_n_steps=4, limit_val_batches=0,
        val_check_interval=None, gradient_clip_val=1.0, enable_progress_bar=True,
    )  # fmt: skip
    with operations:
        trainer.fit(model, small_module.batches(8))
    return count.between


@pytest.mark.parametrize(
    ("algo", "progress"),
    [(algo, ProgressBar) for algo in ("ar", "bd3lm", "mdlm", "sedd", "resample")]
    + [("ar", PlainProgress)],
)
def test_no_step_reads_a_number(compose, tmp_path, algo, progress):
    """Lightning read the loss after every step, for the progress bar and beside it."""
    changes = ALGOS["bd3lm"] if algo == "resample" else ALGOS[algo]
    if algo == "resample":
        changes = [*changes, "training.resample=true", "training.sampling_eps_min=0.3",
                   "training.sampling_eps_max=0.8"]  # fmt: skip
    steps = counted_steps(compose, tmp_path, *changes, progress=progress)
    reads = [step[READS] for step in steps]
    assert reads[3] > 0, "the interval: what is counted is what is read"
    assert reads[:3] + reads[4:] == [0] * 6


def test_a_step_waits_for_its_number_of_masked_tokens(compose, tmp_path):
    """What is left, and why: as many logits are computed as there are masks, ar has none."""
    assert not any(step["nonzero"] for step in counted_steps(compose, tmp_path, *ALGOS["ar"]))
    assert all(step["nonzero"] for step in counted_steps(compose, tmp_path, *ALGOS["bd3lm"]))
