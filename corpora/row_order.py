"""Which rows form which batch, and loaders that go on where they stopped.

The rows of an epoch are one sequence, shuffled by seed and epoch. Global batch k is the k-th piece
of it, whatever the number of processes, of batches per step and of loading processes; each process
takes its slice. The position is therefore one number, the same for all processes: rows consumed.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

logger = logging.getLogger(__name__)

# A loading process that dies, of too little memory say, is replaced so often in an epoch.
_MAX_RESTARTS = 3
# So many epochs without a batch make an error of what may be chance.
_EMPTY_EPOCHS = 3
# How long a loading process outlives SIGTERM, in seconds: its trainer finishes a step meanwhile.
_WORKER_GRACE = 120


class RowOrder(torch.utils.data.Sampler[int]):
    """One process's rows, in order; `epoch * num_rows + row` stands for a row in an epoch.

    An epoch has as many whole global batches as there are, and leaves out the rest. Of fewer rows
    than one global batch it takes those that fill batches of all processes.

    Args:
        num_rows: size of the set.
        batch_size: rows of a batch of one process.
        global_batch_size: rows of an optimizer step.
        rank: this process.
        world_size: number of processes.
        seed: of the shuffling; the epoch is added.
        repeats: every epoch is the first one again.

    Attributes:
        rows_per_batch: rows that all processes together take at a time.
        epoch: whose rows come next.
        first_row: where the next pass over the epoch begins.
        consumed: rows that all processes together have been given in this epoch.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        repeats: bool = False,
    ):
        self.rows_per_batch = batch_size * world_size
        self.epoch = 0
        self.first_row = 0
        self.consumed = 0
        self._num_rows = num_rows
        self._slice = slice(rank * batch_size, (rank + 1) * batch_size)
        self._seed = seed
        self._repeats = repeats
        piece = global_batch_size if num_rows >= global_batch_size else self.rows_per_batch
        self._length = num_rows // piece * piece

    def __len__(self) -> int:
        """Rows of this process in a whole epoch."""
        return self._length // self.rows_per_batch * (self._slice.stop - self._slice.start)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self.epoch]).permutation(self._num_rows)
        order = order[: self._length] + self.epoch * self._num_rows
        stop = self._length - self.rows_per_batch + 1
        for start in range(self.first_row, stop, self.rows_per_batch):
            yield from order[start : start + self.rows_per_batch][self._slice].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; the one that is under way goes on."""
        if epoch != self.epoch and not self._repeats:
            self.epoch, self.first_row, self.consumed = epoch, 0, 0


def _is_of_a_death(error: Exception) -> bool:
    """Tell the end of a loading process from an error in one.

    Torch gives the process's number once it sees it dead. Until then its sockets may be closed
    already. Errors that were raised in a loading process begin with "Caught".
    """
    message = str(error)
    return "DataLoader worker (pid" in message or (
        isinstance(error, ConnectionError | EOFError) and not message.startswith("Caught")
    )


class _ResumableLoader(StatefulDataLoader):
    """Starts loading on the first batch, not before, and replaces loading processes that died.

    Not before: Lightning asks for the iterator first and names the epoch then.
    """

    def __iter__(self) -> Iterator[Any]:
        restarts, batches, has_given = 0, None, False
        first_state = self.next_iter_state  # torchdata's name of the state that was loaded last
        while True:
            try:
                if batches is None:
                    batches = self._start()
                batch = next(batches)
            except StopIteration:
                self._given_out(None)
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not _is_of_a_death(error) or restarts == _MAX_RESTARTS:
                    raise
                restarts += 1
                logger.warning("%s; starting others, which go on where it stopped", error)
                if has_given:
                    self.load_state_dict(self.state_dict())
                else:  # the position is still that of the end of the epoch before
                    self._iterator, self.next_iter_state = None, first_state
                batches = None
            else:
                has_given = True
                self._given_out(batch)
                yield batch

    def shut_down(self) -> None:
        """End the loading processes, which do not end for signals."""
        if self.num_workers > 0 and self._iterator is not None:
            self._iterator._shutdown_workers()
        self._iterator = None

    def _start(self) -> Iterator[Any]:
        """The iterator of a whole epoch, or of what is left of it."""
        handler = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        if threading.current_thread() is threading.main_thread():
            # Torch has put a handler there that raises at a death, wherever the trainer is just
            # then. Asking for the next batch finds out too, and there it can be mended.
            signal.signal(signal.SIGCHLD, handler)
        return batches

    def _given_out(self, batch: Any) -> None:
        """Follow the position; None at the end of an epoch."""
        raise NotImplementedError


class RowLoader(_ResumableLoader):
    """Batches of prepared rows in a `RowOrder`, the argument `sampler`.

    Its state is {epoch, first_row}, which a loader of any other number of processes understands.
    """

    sampler: RowOrder

    def state_dict(self, *, unused: int = 0) -> dict[str, Any]:
        """The position, `unused` batches before the last one that was given out."""
        order = self.sampler
        first_row = order.consumed - unused * order.rows_per_batch
        return {"epoch": order.epoch, "first_row": first_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        order = self.sampler
        order.epoch = state_dict["epoch"]
        order.first_row = order.consumed = state_dict["first_row"]
        self._iterator = None

    def _start(self) -> Iterator[Any]:
        self.sampler.consumed = self.sampler.first_row
        return super()._start()

    def _given_out(self, batch: Any) -> None:
        self.sampler.first_row = 0  # whoever asks again wants the epoch from its beginning
        if batch is not None:
            self.sampler.consumed += self.sampler.rows_per_batch


class SnapshotLoader(_ResumableLoader):
    """Batches of anything else. Its state is one process's own: where each of its workers is.

    Args:
        too_few: says what is wrong where an epoch has no batch at all; None: nothing is.
        args, options: of torch's `DataLoader`.
    """

    def __init__(self, *args: Any, too_few: Callable[[], str] | None = None, **options: Any):
        super().__init__(*args, **options)
        self._too_few = too_few
        self._states: deque[dict[str, Any]] = deque(maxlen=2)

    def __iter__(self) -> Iterator[Any]:
        # One that is resumed may have stopped at the end of an epoch; and files are shared out
        # anew for each, so that there may be no whole batch in one and some in another.
        for _ in range(_EMPTY_EPOCHS):
            is_empty = True
            for batch in super().__iter__():
                is_empty = False
                yield batch
            if not is_empty:
                return
        if self._too_few is not None:
            raise ValueError(self._too_few())

    def state_dict(self, *, unused: int = 0) -> dict[str, Any]:
        """As that of `RowLoader`; `unused` may be 1 at most."""
        return self._states[-1 - unused] if self._states else super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._states.append(state_dict)

    def _given_out(self, batch: Any) -> None:
        if batch is not None:
            self._states.append(super().state_dict())


def ignore_stop_signals(worker_id: int) -> None:
    """A loading process's part (`worker_init_fn`): it serves until its trainer dismisses it.

    Slurm signals every process of a job, and so does Ctrl-C; the step could not be finished.
    """
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)  # the trainer was killed just now; torch's watch over it begins too late
    for signum in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(_WORKER_GRACE))
