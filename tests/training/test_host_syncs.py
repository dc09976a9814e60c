"""What makes the CPU wait for a GPU: counted on the CPU, where the same operations run."""

from collections import Counter
from pathlib import Path

import lightning as L
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.operations import waits
from losses import token_losses
from tests.helpers import small_module
from tests.helpers.small_run import ALGOS
from training.callbacks import EMACallback
from training.nan_guard import NanGuard
from training.progress import PlainProgress, ProgressBar
from training.throughput import Throughput

# Reading a number (`item`, `float`, `bool`).
READS = "_local_scalar_dense"
# A number or a list becomes a tensor: a copy to a GPU, from memory that the CPU must wait for.
UPLOADS = "lift_fresh"


class Operations(TorchDispatchMode):
    """Counts the operations that wait."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in (READS, UPLOADS):
            self.seen[name] += 1
        elif waits(name, args):
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
    compose,
    folder: Path,
    *changes: str,
    progress: type[L.Callback] = ProgressBar,
    batches: int = 8,
) -> list[Counter[str]]:
    """Of all steps but the last, with a logging interval of 4: numbers are read after step 3."""
    model = small_module.module(compose, folder, *changes)
    operations = Operations()
    count = PerStep(operations)
    callbacks = [count, progress(), EMACallback(0.9), NanGuard(str(folder)), Throughput()]
    trainer, _ = small_module.trainer(
        folder, callbacks=callbacks, steps=batches, log_every_n_steps=4, limit_val_batches=0,
        val_check_interval=None, gradient_clip_val=1.0, enable_progress_bar=True,
    )  # fmt: skip
    with operations:
        trainer.fit(model, small_module.batches(batches))
    return count.between


def changes_of(algo: str) -> list[str]:
    if algo != "resample":
        return ALGOS[algo]
    return [*ALGOS["bd3lm"], "training.resample=true", "training.sampling_eps_min=0.3",
            "training.sampling_eps_max=0.8"]  # fmt: skip


@pytest.mark.parametrize(
    ("algo", "progress"),
    [(algo, ProgressBar) for algo in ("ar", "bd3lm", "mdlm", "sedd", "resample")]
    + [("ar", PlainProgress)],
)
def test_no_step_reads_a_number(compose, tmp_path, algo, progress):
    """Lightning read the loss after every step, for the progress bar and beside it."""
    steps = counted_steps(compose, tmp_path, *changes_of(algo), progress=progress)
    reads = [step[READS] for step in steps]
    assert reads[3] > 0, "the interval: what is counted is what is read"
    assert reads[:3] + reads[4:] == [0] * 6


@pytest.mark.parametrize("algo", ["ar", "bd3lm", "mdlm", "sedd", "resample"])
def test_a_step_waits_for_no_number_of_masked_tokens(compose, tmp_path, monkeypatch, algo):
    """As many logits were computed as there are masks, and each of seven operations counted them.

    On a GPU there is room for a number that is known beforehand; on a CPU they are counted once.
    """
    for is_fixed, most in ((False, int(algo != "ar")), (True, 0)):
        monkeypatch.setattr(token_losses, "shapes_are_fixed", lambda _device, on=is_fixed: on)
        folder = tmp_path / str(is_fixed)
        steps = counted_steps(compose, folder, *changes_of(algo), batches=4)
        assert [step["nonzero"] for step in steps] == [most] * 3
        assert not any(step[UPLOADS] for step in steps[1:]), "nor for a copy of a number"
