"""What a step makes the device do: launches, waits and the slowest kernels, by torch's profiler.

On a GPU kernels are what ran there, and waits the calls in which the CPU stood still until the GPU
was done. On a CPU they are PyTorch's operations, and those among them that would wait on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.operations import Operations

NUM_SLOWEST = 10
# Calls of CUDA's runtime and driver as the profiler names them; a name may go on: ...KernelExC.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync",
            "cudaGraphLaunch")  # fmt: skip
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# Ranges that programs name, on a GPU's timeline too: they hold kernels and are none.
_RANGES = ("## ", "ProfilerStep", "Optimizer.", "Torch-Compiled", "aten::")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Means per step.

    Attributes:
        launches: kernels, copies and fillings; on a CPU operations that compute something.
        waits: how often the CPU waited, by the name of what waited.
        busy_ms: of kernels, all together.
        slowest: name, milliseconds and number of calls of the slowest kernels, the slowest first.
    """

    launches: float
    waits: dict[str, float]
    busy_ms: float
    slowest: list[tuple[str, float, float]]


def profile_steps(run: Callable[[], object], *, steps: int, device: torch.device) -> Profile:
    """Profile some steps, which have been warmed up before."""
    is_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * is_gpu]) as found:
        for _ in range(steps):
            run()
    rows = found.key_averages()
    return gpu_profile(rows, steps=steps) if is_gpu else cpu_profile(rows, run, steps=steps)


def gpu_profile(rows: list, *, steps: int) -> Profile:
    """Of the profiler's averages by name."""
    kernels = [row for row in rows if row.device_type.name == "CUDA" and not _is_range(row)]
    calls = {row.key: row.count for row in rows if row.device_type.name == "CPU"}
    return Profile(
        launches=sum(n for name, n in calls.items() if name.startswith(LAUNCHES)) / steps,
        waits={name: n / steps for name, n in calls.items() if name in WAITS},
        **_times([(row.key, row.self_device_time_total, row.count) for row in kernels], steps),
    )


def cpu_profile(rows: list, run: Callable[[], object], *, steps: int) -> Profile:
    """The same of a CPU, whose launches and waits another step is counted for."""
    with Operations() as operations:
        run()
    ops = [row for row in rows if row.key.startswith("aten::")]
    return Profile(
        launches=float(operations.computed.total()),
        waits={name: float(n) for name, n in operations.waits.items()},
        **_times([(row.key, row.self_cpu_time_total, row.count) for row in ops], steps),
    )


def _is_range(row) -> bool:
    return row.key.startswith(_RANGES) or getattr(row, "is_user_annotation", False)


def _times(rows: list[tuple[str, float, int]], steps: int) -> dict:
    """`Profile`'s times, of (name, microseconds, calls) of all steps."""
    per_step = [(name, us / 1e3 / steps, n / steps) for name, us, n in rows]
    per_step.sort(key=lambda row: -row[1])
    return {"busy_ms": sum(row[1] for row in per_step), "slowest": per_step[:NUM_SLOWEST]}
