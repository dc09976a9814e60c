"""How far a run is: lines in the log of a batch job, a bar in a terminal; and what is not said."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import warnings

import lightning as L
import pytest
from lightning.pytorch.callbacks import Timer

from tests.helpers import parallel_runs
from tests.helpers.small_module import batches, trainer
from tests.helpers.small_run import ALGOS, overrides, write_text
from training.progress import (
    PlainProgress,
    ProgressBar,
    duration,
    progress_callback,
    quiet_known_noise,
)

# What Lightning says in every run: on each process, on the first one, and when it advertises.
CHATTER = (
    "GPU available", "TPU available", "was configured", "LOCAL_RANK", "`Trainer.fit` stopped",
    "Initializing distributed", "distributed_backend", "Restor", "litlogger", "litmodels", "Tip:",
)  # fmt: skip

STEP = re.compile(
    r"step (?P<step>[\d,]+)( of (?P<total>[\d,]+))?: loss (?P<loss>\d+\.\d{4}), "
    r"lr (?P<lr>\d\.\d\de[-+]\d\d), (?P<speed>[\d,]+) tokens/s(, (?P<left>.+) left)?"
)
VALIDATION = re.compile(
    r"validation( at step (?P<step>[\d,]+))?: (?P<batches>[\d,]+) batches in (?P<time>.+), "
    r"val/nll (?P<nll>\d+\.\d{4})"
)


@pytest.fixture
def said(caplog):
    """The lines so far, forgotten when they are asked for: `said()`."""
    caplog.set_level(logging.INFO, logger="training.progress")

    def lines() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "training.progress"]
        caplog.clear()
        return found

    return lines


@pytest.fixture
def fit(slow_model, tmp_path):
    """Trains with `PlainProgress`: `fit(training=1.0, steps=4, ...)` returns what was logged."""

    def run(
        *, training=1.0, validation=100.0, num_batches=8, num_valid=1, resume=None,
        callbacks=(), **settings,
    ):  # fmt: skip
        settings = {"enable_progress_bar": True} | settings
        fitted, memory = trainer(tmp_path, callbacks=[PlainProgress(), *callbacks], **settings)
        model = slow_model(training=training, validation=validation)
        loaders = batches(num_batches), batches(num_valid, seed=1)
        fitted.fit(model, *loaders, ckpt_path=resume, weights_only=True)
        return fitted, memory

    return run


def steps_of(lines):
    """The matches of the lines of steps."""
    return [match for line in lines if (match := STEP.fullmatch(line))]


# --- lines of steps ------------------------------------------------------------------------------


def test_a_line_every_so_many_steps(fit, said):
    """Batches of 64 tokens, 1 s each; the validation of 100 s is in the time left alone."""
    fit(steps=8, log_every_n_steps=3, val_check_interval=4)
    lines = said()
    third, fourth, sixth, eighth = lines
    first, second = steps_of([third, sixth])
    assert [first["step"], first["total"], first["speed"]] == ["3", "8", "64"]
    assert [second["step"], second["total"], second["speed"]] == ["6", "8", "64"]
    assert [first["lr"], first["left"], second["left"]] == ["1.00e-02", "5.0 s", "35.3 s"]
    found = [VALIDATION.fullmatch(line) for line in (fourth, eighth)]
    assert [(v["step"], v["batches"], v["time"]) for v in found] == [
        ("4", "1", "1 min 40 s"), ("8", "1", "1 min 40 s"),
    ]  # fmt: skip


def test_the_numbers_are_those_that_are_logged(fit, said):
    _, memory = fit(steps=4, log_every_n_steps=1, val_check_interval=2)
    lines = said()
    losses = [f"{loss:.4f}" for loss in memory.values("trainer/loss")]
    assert [line["loss"] for line in steps_of(lines)] == losses and len(set(losses)) == 4
    found = [match["nll"] for line in lines if (match := VALIDATION.fullmatch(line))]
    assert found == [f"{nll:.4f}" for nll in memory.values("val/nll")] and len(set(found)) == 2


class Losses(L.Callback):
    """Keeps the loss of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(f"{outputs['loss'].item():.4f}")


def test_a_slow_machine_is_never_silent_for_long(fit, said):
    """A line after five minutes, with the loss of that step, which no logger got."""
    losses = Losses()
    fit(training=100.0, steps=8, log_every_n_steps=1000, val_check_interval=100, callbacks=[losses])
    found = steps_of(said())
    assert [line["step"] for line in found] == ["3", "6"]
    assert [line["loss"] for line in found] == [losses.seen[2], losses.seen[5]]
    assert [line["left"] for line in found] == ["8 min 20 s", "3 min 20 s"]
    assert [line["speed"] for line in found] == ["1", "1"]


def test_lines_that_are_due_put_off_the_others(fit, said):
    """At 100 s a step: due at 2, 4, 6 and 8, so that there are never five minutes between."""
    fit(training=100.0, steps=8, log_every_n_steps=2, val_check_interval=100)
    assert [line["step"] for line in steps_of(said())] == ["2", "4", "6", "8"]


def test_accumulated_batches_are_one_step(fit, said):
    fit(steps=4, log_every_n_steps=2, val_check_interval=100, accumulate_grad_batches=2)
    found = steps_of(said())
    assert [(line["step"], line["speed"]) for line in found] == [("2", "64"), ("4", "64")]
    assert found[0]["left"] == "4.0 s"


def test_a_step_may_take_longer_than_the_longest_silence(fit, said):
    """Four batches of 200 s each: a line within the step, where no time left is known yet."""
    fit(
        training=200.0, steps=2, log_every_n_steps=1000, val_check_interval=100,
        accumulate_grad_batches=4,
    )  # fmt: skip
    found = [(line["step"], line["left"]) for line in steps_of(said())]
    assert found == [("0", None), ("1", "13 min 20 s"), ("1", "6 min 40 s"), ("2", "0.0 s")]


def test_a_resumed_run_counts_from_its_step(fit, said, tmp_path):
    """Its pace is that of the steps since."""
    first, _ = fit(steps=4, log_every_n_steps=100, val_check_interval=100)
    first.save_checkpoint(tmp_path / "four.ckpt")
    assert said() == []
    fit(
        training=10.0, steps=8, log_every_n_steps=3, val_check_interval=100,
        resume=tmp_path / "four.ckpt",
    )  # fmt: skip
    (found,) = steps_of(said())
    assert [found["step"], found["total"], found["left"]] == ["6", "8", "20.0 s"]
    assert found["speed"] == "6"  # 64 tokens in 10 s


class StopAfter(L.Callback):
    """Stops as a signal or `trainer.max_time` does."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.parametrize(
    ("settings", "total", "left"),
    [
        ({"steps": -1, "max_epochs": -1}, None, None),
        ({"steps": -1, "max_epochs": 3}, "24", "21.0 s"),
        ({"steps": 100, "max_epochs": 3}, "24", "21.0 s"),
        ({"steps": 10, "max_epochs": 3}, "10", "7.0 s"),
        ({"steps": -1, "max_time": "00:01:00:00"}, None, "42.0 s"),
        ({"steps": 100, "max_time": "00:01:00:00"}, "100", "42.0 s"),
        ({"steps": 10, "max_time": "00:01:00:00"}, "10", "7.0 s"),
    ],
)
def test_what_ends_the_training_first_is_what_counts(settings, total, left, fit, said, monkeypatch):
    """What is not known is left out."""
    monkeypatch.setattr(Timer, "time_remaining", lambda self: 42.0)
    fit(log_every_n_steps=3, val_check_interval=100, callbacks=[StopAfter(3)], **settings)
    (found,) = steps_of(said())
    assert [found["step"], found["total"], found["left"]] == ["3", total, left]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (59.4, "59.4 s"), (59.6, "1 min 0 s"), (3_599.4, "59 min 59 s"),
        (3_599.6, "1 h 0 min"), (45_060, "12 h 31 min"), (86_399, "23 h 59 min"),
        (86_400, "1 d 0 h"), (273_600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- lines of validations ------------------------------------------------------------------------


def test_a_long_validation_says_how_far_it_is(fit, said):
    fit(steps=2, validation=200.0, num_valid=5, log_every_n_steps=100, val_check_interval=2)
    *within, end = said()
    assert within == [f"validation at step 2: {n} of 5 batches" for n in (2, 4)]
    found = VALIDATION.fullmatch(end)
    assert [found["step"], found["batches"], found["time"]] == ["2", "5", "16 min 40 s"]


def test_a_validation_without_training(slow_model, said, tmp_path):
    """As in mode=ppl_eval."""
    run, _ = trainer(tmp_path, callbacks=[PlainProgress()], enable_progress_bar=True)
    (result,) = run.validate(slow_model(validation=200.0), batches(5, seed=1), verbose=False)
    nll = result["val/nll"]
    assert said() == [
        "validation: 2 of 5 batches",
        "validation: 4 of 5 batches",
        f"validation: 5 batches in 16 min 40 s, val/nll {nll:.4f}",
    ]


def test_a_sanity_check_is_silent(fit, said):
    """However long it takes; nor does its time count."""
    fit(
        steps=2, validation=400.0, num_valid=2, log_every_n_steps=2, val_check_interval=100,
        num_sanity_val_steps=2,
    )  # fmt: skip
    (line,) = said()
    assert STEP.fullmatch(line)["speed"] == "64"


# --- where it goes -------------------------------------------------------------------------------


def test_the_bar_in_a_terminal(slow_model, said, tmp_path, monkeypatch):
    """It is there and the lines are not; it is on standard error, whatever standard output is."""
    controller, terminal = pty.openpty()
    shown = []

    def read():
        try:
            while data := os.read(controller, 4096):
                shown.append(data)
        except OSError:  # Linux: the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    printed = io.StringIO()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", printed)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        progress = progress_callback()
        run, _ = trainer(tmp_path, callbacks=[progress], enable_progress_bar=True)
        run.fit(slow_model(training=400.0), batches(4), batches(1, seed=1))
        monkeypatch.undo()
    reader.join()
    os.close(controller)
    screen = b"".join(shown).decode()
    assert isinstance(progress, ProgressBar)
    assert "step: 4/4" in screen and "loss: " in screen
    assert said() == [] and printed.getvalue() == ""


def test_lines_where_standard_error_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_callback(), PlainProgress)


def test_a_batch_job(project, tmp_path):
    """Standard output and error are one file; it and main.log have the lines, and no chatter."""
    write_text(tmp_path)
    command = overrides(
        tmp_path, *ALGOS["ar"], "trainer.log_every_n_steps=2", "trainer.val_check_interval=3",
        "trainer.num_sanity_val_steps=1", "then=[ppl_eval]", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    with open(tmp_path / "job.out", "w") as file:
        status = subprocess.run(
            [sys.executable, project / "main.py", *command],
            cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT, timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).returncode  # fmt: skip
    output = (tmp_path / "job.out").read_text()
    assert status == 0, output
    assert not [text for text in CHATTER if text in output]
    assert "saving model to" in output, "what the user has configured still speaks"
    for text in (output, (tmp_path / "run/main.log").read_text()):
        lines = re.findall(
            r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\]\[training.progress\]\[INFO\] - (.+)$",
            text, flags=re.MULTILINE,
        )  # fmt: skip
        steps = [(match["step"], match["total"]) for match in steps_of(lines)]
        assert steps == [("2", "4"), ("4", "4")]
        validations = [match["step"] for line in lines if (match := VALIDATION.fullmatch(line))]
        assert validations == ["3", None]
        assert len(lines) == 4
    assert "━" not in re.sub("Tokenizing.*", "", output)


@pytest.mark.slow
def test_of_two_processes_the_first_one_speaks(tmp_path):
    write_text(tmp_path)
    changes = [*ALGOS["ar"], "trainer.log_every_n_steps=2", "loader.global_batch_size=4"]
    first, second = parallel_runs.start_pair(tmp_path, {"drawn": changes})
    found = [
        re.findall(r"training\.progress:(.+)$", text, re.MULTILINE) for text in (first, second)
    ]
    assert [line["step"] for line in steps_of(found[0])] == ["2", "4"]
    assert len([line for line in found[0] if VALIDATION.fullmatch(line)]) == 2
    assert len(found[0]) == 4 and found[1] == []
    assert not [text for text in CHATTER if text in first + second]


def test_a_process_that_is_told_to_be_silent(fit, said):
    """As Lightning tells all but the first; it reads no loss either."""

    class Silencer(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.progress_bar_callback.disable()

    fit(steps=4, log_every_n_steps=2, val_check_interval=2, callbacks=[Silencer()])
    assert said() == []


# --- what is not said ----------------------------------------------------------------------------


def test_quietness_is_the_same_the_second_time():
    names = [n for n in logging.root.manager.loggerDict if n.startswith("lightning")]

    def state():
        levels = {n: logging.getLogger(n).level for n in names}
        return levels, {n: list(logging.getLogger(n).filters) for n in names}, warnings.filters[:]

    with warnings.catch_warnings():
        quiet_known_noise()
        once = state()
        quiet_known_noise()
        assert state() == once
