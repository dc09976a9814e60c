"""Leaving a training when told to: finish the step, save, have Slurm requeue the job, exit.

Slurm announces the end of a job's time with SIGUSR1 (`#SBATCH --signal=SIGUSR1@90`) and ends a
preempted or cancelled job with SIGTERM; a terminal sends SIGINT for Ctrl-C.
"""

import os
import signal
import subprocess
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from training.agreement import Question
from training.callbacks import LastCheckpoint
from utils import get_logger

logger = get_logger(__name__)

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

# Seconds after a signal in which a run has to show that it goes on, by the end of a batch. Slurm
# kills what is still there 30 seconds after SIGTERM.
_GRACE = 20
# Or, if that is longer, so many times its longest batch so far.
_LONGEST_BATCHES = 3
# Seconds that a save, or the end of a run, may take.
_LONGEST_SAVE = 600
# Seconds after which a process that did not heed even that is stuck outside of Python.
_LAST_WAIT = 60


class Interrupted(BaseException):
    """A signal ended the run; no `except Exception` on the way takes it for a failure.

    Attributes:
        signum: the signal.
        exit_code: 128 + signal as in a shell; 0 on all processes but the first, because launchers
            kill the rest of a job as soon as one process fails.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum if rank_zero_only.rank == 0 else 0


class StopSignals:
    """Takes the stop signals over while a training is prepared and runs (a context manager).

    Outside of `Trainer.fit` there is nothing to save: a signal raises `Interrupted` at once. In
    it, `StopOnSignal` does so at the next good place, and only a second Ctrl-C does not wait.
    Leaving because of SIGUSR1, a Slurm job is requeued: it goes on when its turn comes.

    A run may never come to that place: its data do not come, or another node is gone. A thread
    watches over it from the first signal on. It raises `Interrupted` in a run that shows no sign of
    life, and ends the process where that is of no use either, since the run is stuck in a library.

    Attributes:
        received: the first signal that came, or None.
        is_patient: leave it to `StopOnSignal` to react.
    """

    def __init__(self):
        self.received: int | None = None
        self.is_patient = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._tells = -1
        self._last_sign_of_life = 0.0
        self._longest_batch = 0.0
        self._is_first_batch = True
        self._is_overdue = False
        self._is_over = threading.Event()

    def __enter__(self) -> "StopSignals":
        self._previous = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
        self.install()
        self._watch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_watching()
        is_leaving = isinstance(error, Interrupted) or self.received is not None
        for signum, handler in self._previous.items():
            # A second signal, Slurm's answer to requeueing say, must not cut short what is left.
            is_ignored = is_leaving and signum != signal.SIGINT
            signal.signal(signum, signal.SIG_IGN if is_ignored else handler)
        if isinstance(error, Interrupted):
            _requeue(error.signum)
        elif error is None and self.received is not None:  # it came as training ended
            _requeue(self.received)
            raise Interrupted(self.received)

    def install(self) -> None:
        """Put the handlers in place; Lightning puts its own there when a training starts."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that has inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if self._is_overdue:
            self._is_overdue = False
            raise Interrupted(self.received or signum)
        is_repeated = self.received is not None
        self.received = self.received or signum
        if is_repeated and not self.is_patient and signum != signal.SIGINT:
            return  # on the way out already, for the reason that came first
        if not self.is_patient or (is_repeated and signum == signal.SIGINT):
            self.is_saving()
            raise Interrupted(signum)
        name = signal.Signals(signum).name
        logger.warning("%s: stopping after this step; Ctrl-C stops now, unsaved", name)

    # A run that does not come to a good place:

    def batch_has_ended(self) -> None:
        """A sign of life. How long batches take decides when one is overdue."""
        now = time.monotonic()
        if not self._is_first_batch:  # which waits for compilers and loading processes
            self._longest_batch = max(self._longest_batch, now - self._last_sign_of_life)
        self._last_sign_of_life = now
        self._is_first_batch = False

    def is_saving(self) -> None:
        """What follows may take long; until a batch has ended, or that."""
        self._last_sign_of_life = time.monotonic() + _LONGEST_SAVE

    def has_saved(self) -> None:
        """What took long has ended."""
        self._last_sign_of_life = time.monotonic()

    def _watch(self) -> None:
        """Start the watch. A pipe tells it of signals even while the main thread is stuck."""
        global _is_watching
        hears, self._tells = os.pipe()
        os.set_blocking(self._tells, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._tells, warn_on_full_buffer=False)
        _is_watching = True
        threading.Thread(target=self._watch_over, args=(hears,), daemon=True).start()

    def _stop_watching(self) -> None:
        global _is_watching
        _is_watching = False
        self._is_over.set()
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._tells)  # the thread, at the other end, reads that nothing follows

    def _watch_over(self, hears: int) -> None:
        with open(hears, "rb", buffering=0) as pipe:
            told = pipe.read(1)
            while told and told[0] not in STOP_SIGNALS:
                told = pipe.read(1)
            if told and not self._is_left_in_time(begin=time.monotonic()):
                self._end(told[0])

    def _is_left_in_time(self, *, begin: float) -> bool:
        while not self._is_over.wait(0.2):
            patience = max(_GRACE, _LONGEST_BATCHES * self._longest_batch)
            if time.monotonic() > max(begin, self._last_sign_of_life) + patience:
                return False
        return True

    def _end(self, signum: int) -> None:
        logger.warning(
            "%s, and no batch has ended since: stopping now. What is saved stays",
            signal.Signals(signum).name,
        )
        self._is_overdue = True
        signal.pthread_kill(threading.main_thread().ident, signum)
        if not self._is_over.wait(_LAST_WAIT):
            logger.error("The process is stuck outside of Python and ends")
            stop = Interrupted(signum)
            _requeue(signum)
            os._exit(stop.exit_code)


_is_watching = False


def _stop_telling() -> None:
    """In a new process, whose signals are no business of those who watch over the one before."""
    if _is_watching:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_stop_telling)


class StopOnSignal(Checkpoint):
    """Ends training after a signal: at the end of an optimizer step, or within a validation.

    After a step last.ckpt is written, and training ends once the step is logged. Within a
    validation last.ckpt holds the state from before it, and it is repeated. All processes stop if
    any of them was signalled, a step later: none waits to hear of the others. (A `Checkpoint`:
    Lightning calls those after all other callbacks.)

    Args:
        signals: what has been received.
        last: writes last.ckpt.
    """

    def __init__(self, signals: StopSignals, last: LastCheckpoint):
        self.signals = signals
        self.last = last
        self._step = 0
        self._shared_batches = 0
        self._is_saved = False
        self._question: Question | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.signals.is_patient = True

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.install()
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self.signals.batch_has_ended()
        if trainer.global_step == self._step:  # gradient accumulation: the step is not complete
            return
        self._step = trainer.global_step
        if self._is_told_to_stop(trainer):
            self.last.save(trainer)
            self.signals.has_saved()
            self._is_saved = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        if self._is_saved:
            self._stop()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_saved:
            self._stop()
        # Shards of different sizes differ in batches; a question to all needs all to be there.
        batches = torch.tensor(float(sum(trainer.num_val_batches)), device=pl_module.device)
        self._shared_batches = int(trainer.strategy.reduce(batches, reduce_op="min"))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.signals.batch_has_ended()
        is_asked = not trainer.sanity_checking and batch_idx < self._shared_batches
        if is_asked and self._is_told_to_stop(trainer):
            self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.signals.is_patient = False

    def _is_told_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether any process was signalled; all then know by what, its own may come later.

        Several processes are told what they asked the last time, so that all stop at one step.
        """
        signum = self.signals.received or 0
        if trainer.world_size > 1:
            asked = self._question
            self._question = Question(signum, device=trainer.strategy.root_device)
            signum = 0 if asked is None else asked.highest()
        self.signals.received = self.signals.received or signum or None
        return signum > 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signals.has_saved()  # what the validation found, by the callbacks before this one

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.signals.is_saving()

    def _stop(self) -> None:
        self.signals.is_saving()  # loggers have something to send yet
        raise Interrupted(self.signals.received)


def _requeue(signum: int) -> None:
    """Hand the Slurm job back to the queue; only SIGUSR1 asks for it."""
    job = os.environ.get("SLURM_JOB_ID")
    if signum != signal.SIGUSR1 or job is None or rank_zero_only.rank != 0:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        problem = done.stderr.strip() if done.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is None:
        logger.info("Slurm job %s is requeued", job)
    else:
        logger.error("Slurm job %s is not requeued (%s); submit it again to go on", job, problem)
