"""Processes that are killed: the training, one of its ranks, a loading process."""

import random
import re
import time

import pytest

from tests.helpers.killable_runs import Run, assert_same_training, kill_at
from tests.helpers.small_run import ALGOS

BD3LM = [*ALGOS["bd3lm"], "training.resample=true"]
EVERY_STEP = "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, straight, count, repeats):
    """SIGKILL in steps, validations, saves and wherever else it falls; one loading process."""
    changes = [*BD3LM, EVERY_STEP, "trainer.max_steps=300", "trainer.val_check_interval=7",
               "loader.batch_size=2", "loader.num_workers=1",
               "trainer.limit_val_batches=1"]  # fmt: skip
    run, draw = Run(tmp_path, *changes), random.Random(5)
    num_kills = repeats(20, in_suite=5)
    for kills in range(num_kills):
        delay = draw.uniform(0, 12 / num_kills)  # together less than the run takes
        process = run.start(preparation=f"""
def strike(self):
    threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start()
before(Diffusion, "on_train_start", strike)
""")
        with process.stdout:  # not to its end: a loading process takes seconds to notice
            assert process.wait(timeout=120) == -9, f"training ended after {kills} kills"
    killed_at = run.last()["global_step"]
    assert 0 < killed_at < 300  # how far depends on the machine
    run.run()
    assert_same_training(straight(*changes), run.last())
    count("SIGKILL at random moments of one run", tried=num_kills, survived=num_kills)


@pytest.mark.slow
def test_kills_while_a_checkpoint_is_written(tmp_path, straight, count, repeats):
    """After a random part of the file; what is there under its own name is always whole."""
    changes = [*BD3LM, EVERY_STEP, "trainer.max_steps=24"]
    run, draw = Run(tmp_path, *changes), random.Random(6)
    num_kills = repeats(10, in_suite=3)
    for attempt in range(num_kills):
        output = run.run(expected=-9, preparation=f"""
import io
from checkpointing import checkpoint_io
class CutShort:
    saves = 0
    def __getattr__(self, name):
        return getattr(torch, name)
    def save(self, checkpoint, file):
        CutShort.saves += 1
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        if CutShort.saves < {draw.randint(3, 6)}:
            file.write(whole.getvalue())
            return
        file.write(whole.getvalue()[: int({draw.random()} * whole.tell())])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint_io.torch = CutShort()
""")
        assert "is damaged" not in output
        assert run.last()["global_step"] > attempt
    output = run.run()
    assert "is damaged" not in output
    assert_same_training(straight(*changes), run.last())
    count("SIGKILL while a checkpoint is written", tried=num_kills, survived=num_kills)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["training_step", "validation_step", "on_validation_epoch_end"])
def test_kill_in_a_step_and_in_a_validation(hook, tmp_path, straight, count):
    changes = [*BD3LM, "trainer.max_steps=5"]
    run = Run(tmp_path, *changes)
    run.run(expected=-9, preparation=kill_at(hook, step=4 if "val" in hook else 3))
    run.run()
    assert_same_training(straight(*changes), run.last())
    count(f"SIGKILL in {hook}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "loader"), [("training", "train_dataloader"), ("validation", "val_dataloaders")]
)
def test_a_loading_process_is_killed(rows, loader, tmp_path, straight, count):
    """Others take its place and go on with the next row: the result is the same.

    Those of the validation rows stay between validations, and this one dies there.
    """
    changes = ["algo=mdlm", "loader.num_workers=2", "trainer.max_steps=12"]
    run = Run(tmp_path, *changes)
    output = run.run(preparation=f"""
def strike(self, *args):
    if self.global_step == 3:
        self.trainer.{loader}._iterator._workers[0].kill()
before(Diffusion, "training_step", strike)
""")
    assert "starting others" in output
    assert_same_training(straight(*changes), run.last())
    count(f"a loading process of the {rows} rows is killed")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_killed(rank, tmp_path, count):
    """The other one says so and exits within a minute; the same command goes on."""
    run = Run(tmp_path, "algo=mdlm", "trainer.devices=2", "strategy=ddp", EVERY_STEP)
    process = run.start(preparation=kill_at("training_step", step=2, rank=rank))
    lines, struck = [], None
    for line in process.stdout:  # ends when no process holds the pipe any more
        lines.append(line)
        if (run.checkpoints / "0-2.ckpt").exists() and struck is None:
            struck = time.monotonic()
    assert process.wait(timeout=60) != 0
    output = "".join(lines)
    assert struck is None or time.monotonic() - struck < 60, output
    assert re.search(r"[Cc]onnection (closed|reset)|terminated with code|another process", output)
    run.run()
    assert run.last()["global_step"] == 4
    count(f"rank {rank} of two is killed: the other exits within 60 s")
