"""Times one job in a process of its own: `python -m benchmarks.measure JOB`, a `Job` as JSON.

Each side of a comparison has a process of its own, so that neither is charged with the memory of
the other. The last line that is printed is the `Result`, as JSON.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.flops import matmul_peak
from benchmarks.machine import peak_memory_mb, start_memory_measurement
from benchmarks.profiled import profile_steps
from benchmarks.steps import Job, make_config, make_model, make_step, model_flops
from utils import keep_freed_memory, made_current

PROJECT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out; a step is an optimizer step, or the evaluation of a batch."""

    seconds: list[float]  # of each timed step
    losses: list[float]
    memory_mb: float  # the most in use: on a GPU of tensors, on a CPU of the whole process
    memory_before_mb: float  # in use before the network was made
    state_mb: float  # of the most: the optimizer's moments and the moving average
    flops: float  # of the model, per step
    peak_flops: float  # FLOP/s of a large matrix product in this precision
    profile: dict | None = None  # `benchmarks.profiled.Profile`, of a job that asks for it

    def joined(self, other: "Result") -> "Result":
        """Both rounds of the same job as one."""
        return Result(
            seconds=self.seconds + other.seconds,
            losses=self.losses + other.losses,
            memory_mb=max(self.memory_mb, other.memory_mb),
            memory_before_mb=max(self.memory_before_mb, other.memory_before_mb),
            state_mb=self.state_mb,
            flops=self.flops,
            peak_flops=max(self.peak_flops, other.peak_flops),
            profile=self.profile,
        )


class JobFailed(RuntimeError):
    """A job ended without a result: an error, too little memory, or out of time."""


def measure(job: Job) -> Result:
    """Time a job in this process."""
    device = made_current(torch.device(job.device))
    if job.side == "ours":
        keep_freed_memory()  # as main.py does
    memory_before = start_memory_measurement(device)
    config = make_config(job)
    model = make_model(job, config)
    step = make_step(job, config, model)
    seconds, losses = [], []
    for i in range(job.warmup + job.steps):
        torch.manual_seed(i)  # the same noise on both sides
        _synchronize(device)
        began = time.perf_counter()
        loss = step.run()
        _synchronize(device)
        seconds.append((time.perf_counter() - began) / step.share)
        losses.append(loss.item())
    memory, profile = peak_memory_mb(device), None
    if job.profiled:
        profile = asdict(profile_steps(step.run, steps=job.profiled, device=device))
    return Result(
        seconds=seconds[job.warmup :],
        losses=losses[job.warmup :],
        memory_mb=memory,
        memory_before_mb=memory_before,
        state_mb=step.state_mb,
        flops=model_flops(job, model),
        peak_flops=matmul_peak(device, DTYPES[job.precision], size=job.peak_size),
        profile=profile,
    )


def measure_apart(job: Job, *, timeout: float | None = None) -> Result:
    """Time a job in a process of its own.

    Args:
        job: what to time.
        timeout: seconds after which it is given up.

    Raises:
        JobFailed: it ended without a result.
    """
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(job))]
    try:
        done = subprocess.run(
            command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise JobFailed(f"not done after {timeout:.0f} s: {job}") from error
    if done.returncode:
        raise JobFailed(f"exit code {done.returncode}: {job}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Time the job of the command line."""
    job = json.loads(sys.argv[1])
    result = measure(Job(**job | {"overrides": tuple(job["overrides"])}))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
