"""`loader.batch_size=auto`: the largest batch that fits into the memory of a device.

The model of the run, with its optimizer and moving average, computes steps on rows of random tokens
in which everything is masked, where a step takes the most memory. It is then thrown away.
"""

import bisect
import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from configuration.training_request import trainer_request
from diffusion import Diffusion
from losses.forward_process import NLL
from models.ema import ExponentialMovingAverage
from training.trainer import bare_trainer

# Of a GPU's memory: the rest is for what other libraries take and for fragments.
USABLE_OF_GPU = 0.92
# Of the memory that a computer has left: others run there too.
USABLE_OF_HOST = 0.8

# Of `trainer`, all that a search needs.
_ARGUMENTS = ("_target_", "accelerator", "devices", "num_nodes")

Fits = Callable[[int], bool]
Step = Callable[[int], None]


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def largest_fitting(sizes: Sequence[int], fits: Fits) -> int | None:
    """The largest size that fits, found by doubling and then bisecting; None if none does.

    Args:
        sizes: ascending.
        fits: true up to some size and false beyond.
    """
    low, high, attempt = -1, len(sizes), 0  # sizes[low] fits, sizes[high] does not
    while low + 1 < high:
        if fits(sizes[attempt]):
            low = attempt
        else:
            high = attempt
        if high == len(sizes):
            attempt = min(bisect.bisect_left(sizes, 2 * sizes[low]), len(sizes) - 1)
        else:
            attempt = (low + high) // 2
    return sizes[low] if low >= 0 else None


def fits_by_trying(step: Step) -> Fits:
    """Whether a step of so many rows ends without running out of a GPU's memory."""

    def fits(size: int) -> bool:
        try:
            step(size)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            # FlexAttention compiles for each size, and up to a limit.
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return fits


def fits_by_estimate(
    step: Step, *, peak: Callable[[], int], room: Callable[[], float]
) -> Fits:
    """Whether so many rows would fit, if each takes as much as the second one did.

    Where running out of memory cannot be tried: a computer ends the process, and a process that
    ends within a step of sharded weights leaves the others waiting for its part.

    Args:
        step: computes a step of so many rows.
        peak: the most memory that was in use since it was last asked for, in bytes.
        room: bytes that are left after a step.
    """
    peaks = []
    for size in (1, 2):
        peak()
        step(size)
        peaks.append(peak())
    per_row, left = max(0, peaks[1] - peaks[0]), room()
    return lambda size: (size - 2) * per_row <= left


def host_peak() -> int:
    """The most memory of this process since the last call, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    with contextlib.suppress(OSError):  # a sandbox: then it is the most since the process began
        Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes(status, "VmHWM") * 1024


def host_room() -> int:
    """Memory that programs on this computer, or in this container, can still take, in bytes."""
    room = _kilobytes(Path("/proc/meminfo").read_text(), "MemAvailable") * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # none, or no limit
        limit = int((group / "memory.max").read_text())
        room = min(room, limit - int((group / "memory.current").read_text()))
    return room


def _kilobytes(table: str, key: str) -> int:
    """The number in a line `key:  number kB` of a file in /proc."""
    return next(int(line.split()[1]) for line in table.splitlines() if line.startswith(f"{key}:"))


class BatchSizeSearch(L.Callback):
    """Finds `batch_size` at the start of a fit, when the model is where and how it trains.

    All processes take the size that fits everywhere.

    Args:
        sizes: that are allowed, ascending.
        ema: decay of the moving average, 0 for none.
    """

    def __init__(self, sizes: Sequence[int], *, ema: float):
        self.sizes = sizes
        self.ema = ema
        self.batch_size: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        average = None
        if self.ema > 0:
            average = ExponentialMovingAverage(pl_module.parameters(), decay=self.ema)

        def step(size: int) -> None:
            x_0 = torch.randint(pl_module.mask_index, (size, pl_module.length))
            with trainer.precision_plugin.train_step_context():
                losses = pl_module.token_losses(x_0.to(pl_module.device), interval=NLL)
                loss = losses.mean()
            loss.backward()
            trainer.optimizers[0].step()
            trainer.optimizers[0].zero_grad()
            if average is not None:
                average.update(pl_module.parameters())

        fits_here = self._fits(trainer, step, is_sharded=pl_module.device_mesh is not None)

        def fits_everywhere(size: int) -> bool:
            return trainer.strategy.reduce_boolean_decision(fits_here(size), all=True)

        self.batch_size = largest_fitting(self.sizes, fits_everywhere)
        trainer.optimizers[0].state.clear()

    def _fits(self, trainer: L.Trainer, step: Step, *, is_sharded: bool) -> Fits:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            share = USABLE_OF_HOST / trainer.num_devices
            return fits_by_estimate(step, peak=host_peak, room=lambda: share * host_room())
        usable = USABLE_OF_GPU * torch.cuda.get_device_properties(device).total_memory
        if not is_sharded:
            torch.cuda.set_per_process_memory_fraction(USABLE_OF_GPU, device)
            return fits_by_trying(step)

        def peak() -> int:
            most = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return most

        return fits_by_estimate(step, peak=peak, room=lambda: usable - peak())

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, trainer.strategy.root_device)


def find_batch_size(config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The value that `loader.batch_size=auto` stands for: rows per device.

    Raises:
        ValueError: not even one row fits.
    """
    trial = with_batch_size(config, 1)
    # Compiled steps take less memory, but compiling each size takes long.
    OmegaConf.update(trial, "training.compile", False)
    request = trainer_request(trial)
    # Others, such as trainer.fast_dev_run or max_epochs, are of the training that follows.
    arguments = {name: request.arguments[name] for name in _ARGUMENTS}
    request = dataclasses.replace(request, arguments=arguments)
    sizes = divisors(config.loader.global_batch_size // request.world_size)
    search = BatchSizeSearch(sizes, ema=config.training.ema)
    trainer = bare_trainer(
        request,
        max_steps=0,  # the search is over before the first
        accumulate_grad_batches=1,
        callbacks=[search],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Diffusion(trial, tokenizer), DataLoader([0]))
    if search.batch_size is None:
        raise ValueError(
            "loader.batch_size=auto: not even one row fits into memory; allowed and smaller are "
            "another model, model.length, training.activation_checkpointing=blocks, and on several "
            "devices strategy=fsdp"
        )
    return search.batch_size


def with_batch_size(config: DictConfig, batch_size: int) -> DictConfig:
    """The configuration with `loader.batch_size`; gradient accumulation follows from it."""
    found = copy.deepcopy(config)
    found.loader.batch_size = batch_size
    return found
