"""Processes of a run hear of one another without waiting: what they log, and when they stop."""

import socket
from collections import Counter
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from tests.helpers import small_module
from training.agreement import Question
from training.signals import StopOnSignal, StopSignals


@pytest.fixture
def collectives(monkeypatch) -> Counter[str]:
    """Counts the operations in which processes meet, in a group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    seen: Counter[str] = Counter()

    def counted(name: str):
        function = getattr(dist, name)

        def call(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(dist, name, call)

    for name in ("all_reduce", "barrier", "all_gather", "broadcast_object_list"):
        counted(name)
    yield seen
    if dist.is_initialized():
        dist.destroy_process_group()


class Meetings(StopOnSignal):
    """Counts what has been met for in each batch, and asks as if there were two processes."""

    def __init__(self, seen: Counter[str]):
        super().__init__(StopSignals(), last=None)
        self.seen, self.steps = seen, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.steps.append(Counter(self.seen))

    def _is_told_to_stop(self, trainer):
        strategy = SimpleNamespace(root_device=trainer.strategy.root_device)
        return super()._is_told_to_stop(SimpleNamespace(world_size=2, strategy=strategy))


def test_processes_meet_once_a_step_and_do_not_wait(collectives, compose, tmp_path, monkeypatch):
    """Every batch had a barrier and an all-reduce for a loss that nobody wrote down.

    And every step the same again for a flag, which was read at once. Two batches a step, and the
    loss is logged every second step: its mean is taken in batches 3 and 7 alone.
    """
    monkeypatch.setattr(StopSignals, "install", lambda self: None)
    meetings = Meetings(collectives)
    trainer, memory = small_module.trainer(
        tmp_path, callbacks=[meetings], steps=5, log_every_n_steps=2, accumulate_grad_batches=2,
        limit_val_batches=0, val_check_interval=None,
        enable_checkpointing=None, strategy=DDPStrategy(process_group_backend="gloo"),
    )  # fmt: skip
    trainer.fit(small_module.module(compose, tmp_path, "algo=ar"), small_module.batches(10))
    pairs = zip(meetings.steps, meetings.steps[1:], strict=False)
    steps = [dict(after - before) for before, after in pairs]
    of_flag = {"all_reduce": 1}
    of_loss = {"all_reduce": 2, "barrier": 1, "all_gather": 1}  # the last by `HighLoss`
    assert steps[:8] == [of_flag, {}, of_loss, {}, of_flag, {}, of_loss, {}]
    assert len(memory.values("trainer/loss")) == 2


class Others:
    """Stands for `dist.all_reduce` of a process beside which another one has been signalled."""

    def __init__(self):
        self.number, self.pending = 0, []

    def __call__(self, tensor, *, op, async_op):
        assert op == dist.ReduceOp.MAX and async_op
        answer = max(self.number, int(tensor))
        self.pending.append(tensor)
        return SimpleNamespace(wait=lambda: tensor.fill_(answer))


def test_all_stop_at_the_step_after(monkeypatch):
    """What was asked at a step is read at the next, by the process that was told as by the others.

    A single process is told at once.
    """
    others = Others()
    monkeypatch.setattr(dist, "all_reduce", others)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    for told_here in (False, True):
        stop = StopOnSignal(StopSignals(), last=None)
        trainer = SimpleNamespace(world_size=2, strategy=strategy)
        others.number = 0
        assert not stop._is_told_to_stop(trainer)
        stop.signals.received, others.number = (10, 0) if told_here else (None, 10)
        assert not stop._is_told_to_stop(trainer)
        assert stop._is_told_to_stop(trainer)
        assert stop.signals.received == 10
    alone = StopOnSignal(StopSignals(), last=None)
    alone.signals.received = 10
    assert alone._is_told_to_stop(SimpleNamespace(world_size=1, strategy=strategy))


def test_a_question_has_the_highest_answer(monkeypatch):
    others = Others()
    monkeypatch.setattr(dist, "all_reduce", others)
    others.number = 3
    questions = [Question(number, device=torch.device("cpu")) for number in (2, 7)]
    assert [question.highest() for question in questions] == [3, 7]


def test_a_loss_is_logged_where_a_callback_ends_the_training(compose, tmp_path):
    """As `trainer.max_time` does, at a step that would not have been logged otherwise."""
    reduced = []

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            trainer.should_stop = trainer.global_step == 2

    trainer, memory = small_module.trainer(
        tmp_path, callbacks=[Stop()], log_every_n_steps=50,
        limit_val_batches=0, val_check_interval=None,
    )  # fmt: skip
    reduce = trainer.strategy.reduce
    trainer.strategy.reduce = lambda tensor, *args, **kw: (
        reduced.append(float(tensor)) or reduce(tensor, *args, **kw)
    )
    trainer.fit(small_module.module(compose, tmp_path, "algo=ar"), small_module.batches(8))
    assert memory.values("trainer/loss") == pytest.approx(reduced[-1:])
