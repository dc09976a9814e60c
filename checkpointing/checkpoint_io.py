"""Checkpoint files that are there whole or not at all."""

import contextlib
import io
import os
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io import TorchCheckpointIO

from utils import get_logger, partial_name

logger = get_logger(__name__)

# A file appears there under its name when all of it has arrived, and renaming would copy it.
PUBLISHES_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to another name, has the disk confirm it, then renames.

    A file that cannot be written, because the disk is full say, is an error in the log and not
    the end of the run: the checkpoint before it is still there, and the next one may fit again.

    Attributes:
        failures: message by path, of files whose last writing failed.
    """

    def __init__(self):
        self.failures: dict[str, str] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = str(path)
        fs, name = fsspec.core.url_to_fs(path)
        write = _write_local if isinstance(fs, LocalFileSystem) else _write_remote
        try:
            fs.makedirs(fs._parent(name), exist_ok=True)
            write(checkpoint, fs, name)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError of a full disk
            reason = str(error.__context__ or error).strip().split("\n")[0]
            self.failures[path] = f"{path}: cannot be written ({reason})"
            logger.error("%s; training goes on, and older checkpoints stay", self.failures[path])
        else:
            self.failures.pop(path, None)

    def link(self, path: str, name: str) -> bool:
        """Have another name for a file that was just written, in the place of what bears it.

        Files are never written in place, so neither name changes what is under the other; and a
        file stays as long as it has one.

        Returns:
            False where there can be none: not a local disk, one without hard links, or the file
            could not be written. Nothing has changed then.
        """
        fs, source = fsspec.core.url_to_fs(path)
        if not isinstance(fs, LocalFileSystem) or path in self.failures:
            return False
        target = fsspec.core.url_to_fs(name)[1]
        partial = partial_name(target)
        try:
            _remove(partial)
            os.link(source, partial)
            os.replace(partial, target)
        except OSError:
            return False
        finally:
            _remove(partial)  # renaming leaves it where both are names of this file already
        _sync_directory_of(target)
        self.failures.pop(name, None)
        return True

    def raise_if_last_failed(self) -> None:
        """At the end of a training, whose result a run must not lack without saying so.

        Raises:
            OSError: the latest attempt to write last.ckpt failed.
        """
        for path, message in self.failures.items():
            if path.endswith("/last.ckpt"):
                raise OSError(f"{message}; what is there is older than the end of the training")


def _write_local(checkpoint: dict[str, Any], fs: LocalFileSystem, name: str) -> None:
    partial = partial_name(name)
    _remove(partial)  # of a process that was killed: maybe another name of a checkpoint
    try:
        with open(partial, "xb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name)
    except BaseException:
        _remove(partial)
        raise
    _sync_directory_of(name)


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(name)


def _sync_directory_of(name: str) -> None:
    """A new name is on the disk when the directory is."""
    directory = os.open(os.path.dirname(name), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_remote(checkpoint: dict[str, Any], fs: fsspec.AbstractFileSystem, name: str) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & PUBLISHES_WHOLE:
        fs.pipe_file(name, buffer.getvalue())
        return
    partial = partial_name(name)
    fs.pipe_file(partial, buffer.getvalue())
    fs.mv(partial, name)
