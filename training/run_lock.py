"""One training at a time in a `checkpointing.save_dir`."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import filelock

from utils import file_lock, get_logger, lock_holder, process_rank

logger = get_logger(__name__)

LOCK = ".training.lock"
# Seconds that a training may take to end which was just told to, and after which a network file
# system has noticed that a node has died.
_LEAVING, _NODE_LOST = 10, 120
_SLURM_JOB = re.compile(r"Slurm job (\S+) after (\d+) restarts")


@contextlib.contextmanager
def only_training_in(save_dir: str) -> Iterator[None]:
    """Keep other trainings out of a directory, and remove what killed ones left half-written.

    The first process of a run does it for all. Nothing can be locked in an object store.

    Args:
        save_dir: `checkpointing.save_dir`, absolute or a URL.

    Raises:
        ValueError: another training, which lives, writes there.
    """
    if process_rank()[0] > 0 or "://" in save_dir:
        yield
        return
    with contextlib.ExitStack() as held:
        _take(Path(save_dir, LOCK), held)
        for leftover in Path(save_dir, "checkpoints").glob("*.ckpt.*partial"):
            leftover.unlink()
        yield


def _take(path: Path, held: contextlib.ExitStack) -> None:
    """Get the lock, at once or when its holder, that is about to leave, has left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(filelock.Timeout):
        held.enter_context(file_lock(path, timeout=0))
        return
    patience = _NODE_LOST if _restarts() else _LEAVING
    logger.info(
        "%s is in use by %s; waiting up to %d s for it to end",
        path.parent, lock_holder(path), patience,
    )  # fmt: skip
    try:
        held.enter_context(file_lock(path, timeout=patience))
    except filelock.Timeout:
        if not _was_requeued_from(lock_holder(path)):
            raise ValueError(
                f"checkpointing.save_dir={path.parent}: {lock_holder(path)} is training there; "
                "allowed is a directory of its own for each training, or to wait until that one "
                "has ended"
            ) from None
        logger.warning("%s: its node is lost, this job takes its place", lock_holder(path))


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _was_requeued_from(holder: str) -> bool:
    """Whether the holder is this Slurm job before it was requeued, which Slurm has ended."""
    found = _SLURM_JOB.search(holder)
    return (
        found is not None
        and found[1] == os.environ.get("SLURM_JOB_ID")
        and int(found[2]) < _restarts()
    )
