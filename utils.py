"""Small things that every room may need: logging, files, seeds, ranks and devices, memory."""

import contextlib
import ctypes
import errno
import io
import itertools
import json
import logging
import math
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import fsspec
import numpy as np
import torch


class _RankZeroFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return process_rank()[0] == 0


def get_logger(name: str) -> logging.Logger:
    """A logger that speaks on the first process only."""
    logger = logging.getLogger(name)
    if not any(isinstance(f, _RankZeroFilter) for f in logger.filters):
        logger.addFilter(_RankZeroFilter())
    return logger


class _Terminal(io.TextIOWrapper):
    """Where text is printed, which may fail without harm; the rest then goes nowhere."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what is still in the buffer goes there too
        os.close(nowhere)


def print_without_fail() -> None:
    """Let nothing that is printed end this process; for the beginning of a command.

    A character that the terminal's encoding lacks becomes a question mark. Where nobody reads on
    (`| head`, a closed terminal) or the disk of a log is full, further text is lost.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            terminal = _Terminal(
                stream.buffer,
                encoding=stream.encoding,
                errors="replace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, terminal)


def in_batch_job() -> bool:
    """Whether standard error is no terminal: whoever looks at the run reads its log."""
    return not sys.stderr.isatty()


def duration(seconds: float) -> str:
    """In the two largest units: `3 d 4 h`, `12 h 31 min`, `5 min 2 s`; `7.3 s` below a minute."""
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    for (unit, size), (next_unit, next_size) in itertools.pairwise(units):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{seconds:.1f} s"


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


def one_line(error: BaseException) -> str:
    """What an error says, in one line, whatever a library made of it."""
    text = str(error)
    if "\nOriginal Traceback" in text:  # torch's, of a loading process: "ValueError: ..." ends it
        text = re.split(r"\n  .*\n(?=\S)", text)[-1].partition(": ")[2]  # behind its last frame
    return " ".join(text.split()) or type(error).__name__


def partial_name(name: str) -> str:
    """Where this process writes a file before it is whole; no other process writes there."""
    return f"{name}.{socket.gethostname()}-{os.getpid()}.partial"


def write_text(path: str, text: str) -> None:
    """Write a file whole or not at all, at any place fsspec reaches; makes its directory.

    Raises:
        OSError: names the file; what was there before is unchanged.
    """
    fs, name = fsspec.core.url_to_fs(path)
    partial = partial_name(name)
    try:
        fs.makedirs(fs._parent(name), exist_ok=True)
        with fs.open(partial, "wb") as file:
            file.write(text.encode())
        fs.mv(partial, name)
    except OSError as error:
        with contextlib.suppress(OSError):
            fs.rm_file(partial)
        raise OSError(f"{path}: cannot be written ({error})") from error


# What file systems without flock answer: Lustre and some NFS and FUSE mounts.
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# Without flock a holder says every so often that it lives. Seconds after which nobody believes it.
_LEASE = 60


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str], *, timeout: float = -1) -> Iterator[None]:
    """Holds an exclusive lock, which a process that is killed does not leave behind.

    By flock, which network file systems pass on to other nodes; where there is none, by a file
    beside it that the holder renews. `lock_holder` says who has it.

    Args:
        path: of a local file, made where it is missing; it stays.
        timeout: seconds to wait for it; 0 not at all, -1 for ever.

    Raises:
        filelock.Timeout: another process has it.
        OSError: the file cannot be made.
    """
    lock = filelock.FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        lock = filelock.SoftFileLease(f"{path}.lease", timeout=timeout, lease_duration=_LEASE)
        lock.acquire()
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        if "SLURM_JOB_ID" in os.environ:
            restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
            holder += f", Slurm job {os.environ['SLURM_JOB_ID']} after {restarts} restarts"
        with contextlib.suppress(OSError):  # a full disk
            Path(path).write_text(holder)
        yield
    finally:
        lock.release()


def lock_holder(path: str | os.PathLike[str]) -> str:
    """Who took a lock last: `process 12 on node3`, and its Slurm job."""
    with contextlib.suppress(OSError):
        return Path(path).read_text() or "another process"
    return "another process"


def json_text(value: Any, **style: Any) -> str:
    """Valid JSON of plain containers: NaN and infinity, which it does not have, become null.

    Args:
        value: what to write.
        style: further arguments of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **style)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes.

    As the process group says; before there is one as torchrun, Lightning's launcher or srun do. A
    launcher may itself have been started by srun.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    for rank, world_size in (
        ("RANK", "WORLD_SIZE"),
        ("LOCAL_RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    return 0, 1


def resolve_device(accelerator: str) -> torch.device:
    """The device of this process for `trainer.accelerator`; processes of a node take turns."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return made_current(torch.device("cuda", local_rank % torch.cuda.device_count()))


def made_current(device: torch.device) -> torch.device:
    """The device; a GPU is from now on the one that streams, graphs and kernels mean by default.

    Their default is otherwise the first GPU that the process sees, wherever its tensors are.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


# Random numbers of different purposes come from different streams of one seed.
TRAIN_STREAM, VALIDATION_STREAM, SAMPLE_STREAM = 0, 1, 2


def derive_seed(*parts: int) -> int:
    """An independent 63-bit seed for each tuple of integers, such as (seed, rank, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
