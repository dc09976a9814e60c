"""Signals: the step is finished, the state saved, the Slurm job requeued, the process gone."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.helpers.killable_runs import Run, assert_same_training, kill_at
from tests.helpers.small_run import ALGOS
from training import signals as signals_module
from training.signals import STOP_SIGNALS, Interrupted, StopSignals

CHANGES = [*ALGOS["bd3lm"], "loader.batch_size=2", "loader.num_workers=1",
           "trainer.val_check_interval=8", "trainer.max_steps=6",
           "callbacks.checkpoint_every_n_steps.every_n_train_steps=500"]  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict:
    """The last checkpoint of a run that nothing happens to."""
    run = Run(tmp_path_factory.mktemp("straight"), *CHANGES)
    run.run()
    return run.last()


@pytest.fixture
def scontrol(tmp_path):
    """A stand-in for Slurm's command; returns the environment of a job, and what was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$2" = 77 ]\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{folder}:{os.environ['PATH']}"
    return lambda job: {"PATH": path, "SLURM_JOB_ID": job, "SLURM_JOB_NAME": "bash"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "hook"),
    [
        (signal.SIGTERM, "training_step"),
        (signal.SIGINT, "training_step"),
        (signal.SIGUSR1, "training_step"),
        (signal.SIGTERM, "validation_step"),
    ],
)
def test_stops_after_the_step_and_goes_on(signum, hook, tmp_path, straight):
    """The signal comes in the first of the two batches of a step, or in a validation."""
    run = Run(tmp_path, *CHANGES)
    output = run.run(expected=128 + signum, preparation=kill_at(hook, step=4, signum=signum))
    assert f"stopped by {signum.name}; the same command goes on" in output
    assert run.last()["global_step"] == (5 if hook == "training_step" else 4)
    run.run()
    assert_same_training(straight, run.last())


@pytest.mark.slow
def test_a_slurm_job_is_requeued(tmp_path, scontrol):
    """Only after SIGUSR1: SIGTERM comes with scancel, and preemption requeues by itself."""
    run = Run(tmp_path, "algo=mdlm")
    usr1 = kill_at("training_step", step=1, signum=signal.SIGUSR1)
    output = run.run(expected=128 + signal.SIGUSR1, preparation=usr1, **scontrol("77"))
    assert "Slurm job 77 is requeued" in output
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    term = kill_at("training_step", step=2, signum=signal.SIGTERM)
    run.run(expected=128 + signal.SIGTERM, preparation=term, **scontrol("77"))
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path, scontrol):
    """One of them is told; both finish the step, and the other one requeues the job.

    What they asked one another after the step they read in the validation that follows it.

    Signals reach nodes at different times: where the first process had none yet when it stopped,
    the job was not requeued.
    """
    changes = ["algo=mdlm", "trainer.devices=2", "strategy=ddp"]
    run = Run(tmp_path, *changes)
    stop = kill_at("training_step", step=1, signum=signal.SIGUSR1, rank=1)
    run.run(expected=128 + signal.SIGUSR1, preparation=stop, **scontrol("77"))
    assert run.last()["global_step"] == 2
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    run.run()
    assert run.last()["global_step"] == 4


def test_before_training_there_is_nothing_to_wait_for(monkeypatch, tmp_path, scontrol):
    """While data are prepared SIGUSR1 ended the process, and the job was not requeued."""
    for name, value in scontrol("77").items():
        monkeypatch.setenv(name, value)
    handlers = [signal.getsignal(s) for s in STOP_SIGNALS]
    try:
        with pytest.raises(Interrupted, match="SIGUSR1") as stopped, StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "Slurm's answer to requeueing"
    finally:
        for signum, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(signum, handler)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


# --- runs that make no steps ---------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """Handlers are put back, and nobody is given long."""
    monkeypatch.setattr(signals_module, "_GRACE", 0.3)
    monkeypatch.setattr(signals_module, "_LAST_WAIT", 2)
    handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_run_that_makes_no_step_is_ended(impatient, signum, monkeypatch):
    """ "Stopping after this step", which never ended: only SIGKILL helped."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(Interrupted, match=signum.name) as stopped, StopSignals() as signals:
        signals.is_patient = True
        os.kill(os.getpid(), signum)
        time.sleep(60)
    assert stopped.value.exit_code == 128 + signum


def test_a_run_that_makes_steps_is_left_to_end_one(impatient):
    """However long they take, if those before took as long; a save may take longer."""
    with pytest.raises(Interrupted, match="SIGTERM"), StopSignals() as signals:
        signals.is_patient = True
        for _ in range(2):
            time.sleep(0.4)
            signals.batch_has_ended()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # less than three times 0.4
        signals.batch_has_ended()
        signals.is_saving()
        time.sleep(1.6)
        signals.has_saved()
        begin = time.monotonic()
        while time.monotonic() < begin + 60:  # no batch any more
            time.sleep(0.01)
    assert 1 < time.monotonic() - begin < 10


def test_signals_of_other_processes_are_not_ours(impatient):
    """A loading process inherits the pipe that the watch listens to; torch ends it by SIGTERM."""
    with StopSignals() as signals:
        signals.is_patient = True
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
            time.sleep(60)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        time.sleep(1)


STUCK = """
import ctypes, sys
sys.path.insert(0, "PROJECT")
from training import signals
signals._GRACE = signals._LAST_WAIT = 0.5
with signals.StopSignals() as stop:
    stop.is_patient = PATIENT
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # never comes back from the second
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_patient", [True, False])
def test_a_process_that_is_stuck_in_a_library_ends(is_patient, project):
    """Python's handlers run between two of its own instructions: a collective that waits for a
    node that is gone has none."""
    code = STUCK.replace("PROJECT", str(project)).replace("PATIENT", str(is_patient))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("signum", STOP_SIGNALS)
@pytest.mark.parametrize("moment", ["data", "sanity", "loader"])
def test_signals_end_a_training_that_makes_no_steps(tmp_path, signum, moment):
    """While rows are made, in the first validation, and where the loader never gives a batch."""
    hang = {
        "data": "import dataloader\nbefore(dataloader, 'get_dataloaders', hang)",
        "sanity": "before(Diffusion, 'validation_step', hang)",
        "loader": "from corpora import row_order\nbefore(row_order.RowLoader, '_start', hang)",
    }[moment]
    run = Run(tmp_path, "algo=mdlm", "trainer.num_sanity_val_steps=1")
    output = run.run(expected=128 + signum, preparation=f"""
from training import signals
signals._GRACE = 1
def hang(*args):
    os.kill(os.getpid(), {int(signum)})
    while True:
        time.sleep(0.1)
{hang}
""")  # fmt: skip
    assert "stopped by" in output and "Traceback" not in output
    assert ("stopping now" in output) == (moment != "data")


def test_only_a_second_ctrl_c_does_not_wait():
    with StopSignals() as signals:
        signals.is_patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
        signals.received = None


def test_the_first_reason_counts(monkeypatch, tmp_path, scontrol):
    """A SIGTERM while the run is being put away took the place of SIGUSR1: no requeueing."""
    for name, value in scontrol("77").items():
        monkeypatch.setenv(name, value)
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    try:
        with pytest.raises(Interrupted, match="SIGUSR1"), StopSignals():
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)  # late, as the process exits
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_what_slurm_refuses_is_said(monkeypatch, scontrol, caplog):
    for name, value in scontrol("13").items():
        monkeypatch.setenv(name, value)
    before = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    try:
        with pytest.raises(Interrupted), StopSignals() as signals:
            signals.is_patient = True
            os.kill(os.getpid(), signal.SIGUSR1)  # training ends before it can react
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert "Slurm job 13 is not requeued" in caplog.text
