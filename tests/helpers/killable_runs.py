"""Trainings in processes of their own, which can be killed, and what they leave behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.small_run import overrides, write_text

PROJECT = Path(__file__).resolve().parents[2]

# Runs main.py after a piece of code that makes something happen at a given moment.
SCRIPT = """
import os, signal, sys, threading, time
import torch
import diffusion
Diffusion = diffusion.Diffusion
def before(owner, name, action):
    original = getattr(owner, name)
    def replaced(*args, **kwargs):
        action(*args)
        return original(*args, **kwargs)
    setattr(owner, name, replaced)
PREPARATION
with open("PROJECT/main.py") as file:
    exec(compile(file.read(), "PROJECT/main.py", "exec"))
"""


class Run:
    """Trainings that share a folder: each start goes on from the checkpoints of those before.

    Args:
        folder: where text, cache, outputs and checkpoints go.
        changes: overrides, besides those of `tests.helpers.small_run`.
    """

    def __init__(self, folder: Path, *changes: str):
        self.folder = folder
        self.changes = changes
        if not (folder / "train.txt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "kept/checkpoints"

    def start(self, *changes: str, preparation: str = "", **environment: str) -> subprocess.Popen:
        """Start `main.py`; `preparation` is Python that runs before it, see `SCRIPT`."""
        script = self.folder / "prepared.py"
        code = SCRIPT.replace("PREPARATION", preparation).replace("PROJECT", str(PROJECT))
        script.write_text(code)
        command = overrides(
            self.folder, f"checkpointing.save_dir={self.folder}/kept", *self.changes, *changes
        )
        return subprocess.Popen(
            [sys.executable, str(script), *command],
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    def run(self, *changes: str, expected: int | None = 0, timeout: int = 240, **how: str) -> str:
        """Run to the end, and return what was printed; `expected`: the exit status."""
        process = self.start(*changes, **how)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"still running after {timeout} s:\n{output}") from None
        assert expected is None or process.returncode == expected, output
        return output

    def last(self) -> dict:
        return torch.load(self.checkpoints / "last.ckpt", weights_only=True)


def kill_at(hook: str, *, step: int, signum: int = signal.SIGKILL, rank: int = 0) -> str:
    """Preparation: signal the own process once, as a method of `Diffusion` is called at a step."""
    return f"""
struck = False
def strike(self, *args):
    global struck
    if self.global_step == {step} and self.global_rank == {rank} and not struck:
        struck = True
        os.kill(os.getpid(), {int(signum)})
before(Diffusion, {hook!r}, strike)
"""


def assert_equal(one: object, other: object, *, at: str = "checkpoint") -> None:
    """Nested containers of tensors and numbers are equal bit by bit."""
    assert type(one) is type(other), at
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_equal(one[key], other[key], at=f"{at}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, at=f"{at}[{i}]")
    else:
        assert one == other or (one != one and other != other), f"{at}: {one} is not {other}"


def assert_same_training(one: dict, other: dict) -> None:
    """Weights, average, optimizer, schedule, clipped range, metrics and position are the same.

    Left out are the configuration and the paths in it, and counters of validation batches.
    """
    left_out = ["hyper_parameters", "callbacks", "loops"]
    if "first_row" not in one["resume"]["positions"][0]:  # a stream's is partly torchdata's own
        left_out.append("resume")
    assert_equal(*({k: v for k, v in ckpt.items() if k not in left_out} for ckpt in (one, other)))
    loops = [
        {k: v for k, v in ckpt["loops"]["fit_loop"].items() if "val_loop" not in k}
        for ckpt in (one, other)
    ]
    assert_equal(*loops, at="fit_loop")
