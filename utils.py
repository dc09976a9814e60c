"""Small things that several modules need: logging, files, the cosine schedule, precision."""

import contextlib
import ctypes
import logging
import math
import os
import warnings

import fsspec
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class _RankZeroFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return rank_zero_only.rank == 0


def get_logger(name: str) -> logging.Logger:
    """A logger that speaks on the first process only."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _RankZeroFilter) for f in logger.filters):
        logger.addFilter(_RankZeroFilter())
    return logger


def quiet_known_noise() -> None:
    """Silence what Lightning and its libraries say in every run and nobody can act on."""
    for message in (
        "`isinstance\\(treespec",
        ".*set_vital.* is deprecated",
        "The '.*_dataloader' does not have many workers",
    ):
        warnings.filterwarnings("ignore", message=message)
    advertisement = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertisement.addFilter(lambda record: "litlogger" not in record.getMessage())


# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back to the system.

    Otherwise each tensor of a few MB is made of fresh pages, and a page fault for every 4 KB takes
    longer than most arithmetic. Does nothing where the C library is not glibc.
    """
    _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})  # no block goes straight back


def keep_freed_memory_for_sampling() -> None:
    """The same for what a sampler's pass makes, up to 32 MB; what has been freed so far goes back.

    A KV cache is larger. The C library fits no aligned block into the hole that one of the same
    size has left, so a second batch's cache would come on top of the first one's.
    """
    blocks = {_M_MMAP_MAX: 65_536, _M_MMAP_THRESHOLD: 2**25}  # glibc's own, and the most it takes
    _mallopt({**blocks, _M_TRIM_THRESHOLD: 2**31 - 1})
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(settings: dict[int, int]) -> None:
    """Set glibc's options; others have none of this kind."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        library = ctypes.CDLL(None)
        for name, value in settings.items():
            library.mallopt(name, value)


def file_exists(path: str) -> bool:
    """Whether a file or directory exists, at any place fsspec reaches."""
    fs, name = fsspec.core.url_to_fs(path)
    return fs.exists(name)


def absolute_path(path: str, *, base: str = "") -> str:
    """`path` as seen from `base`; URLs (s3://...) stay as they are.

    Args:
        path: relative, absolute or in the home directory (`~`).
        base: an absolute directory, or "" for the working directory.
    """
    for prefix in ("file://", "local://"):  # Lightning takes them for relative paths
        path = path.removeprefix(prefix)
    if "://" in path:
        return path
    return os.path.abspath(os.path.join(base, os.path.expanduser(path)))


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all, at any place fsspec reaches; makes its directory.

    Raises:
        OSError: names the file; what was there before is unchanged.
    """
    fs, name = fsspec.core.url_to_fs(path)
    partial = f"{name}.partial"
    try:
        fs.makedirs(fs._parent(name), exist_ok=True)
        with fs.open(partial, "wb") as file:
            file.write(text.encode())
        fs.mv(partial, name)
    except OSError as error:
        with contextlib.suppress(OSError):
            fs.rm_file(partial)
        raise OSError(f"{path}: cannot be written ({error})") from error


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun, Lightning or srun say."""
    for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    return rank_zero_only.rank, int(os.environ.get("WORLD_SIZE", 1))


def resolve_device(accelerator: str) -> torch.device:
    """The device of this process for `trainer.accelerator`; processes of a node take turns."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def lightning_precision(precision: str | int) -> str:
    """Lightning's name of a precision; the original's configs say `bf16` for mixed bf16."""
    names = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}
    return names.get(str(precision), str(precision))


def cosine_decay_with_warmup(
    optimizer: Optimizer,
    *,
    t_initial: int,
    warmup_t: int,
    warmup_lr_init: float,
    lr_min: float,
    warmup_prefix: bool = True,
) -> LambdaLR:
    """Linear warm-up from warmup_lr_init, then half a cosine down to lr_min, which stays.

    Args:
        optimizer: its learning rates are the peak.
        t_initial: length of the cosine in steps.
        warmup_t: length of the warm-up in steps.
        warmup_lr_init: learning rate at step 0.
        lr_min: learning rate after the cosine.
        warmup_prefix: the cosine starts after the warm-up; otherwise it counts from step 0.
    """

    def schedule(peak: float):
        def factor(step: int) -> float:
            if step < warmup_t:
                return (warmup_lr_init + (peak - warmup_lr_init) * step / warmup_t) / peak
            done = min((step - warmup_t * warmup_prefix) / t_initial, 1.0)
            return (lr_min + (peak - lr_min) * 0.5 * (1 + math.cos(math.pi * done))) / peak

        return factor

    return LambdaLR(optimizer, [schedule(group["lr"]) for group in optimizer.param_groups])
