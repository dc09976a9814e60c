"""Where and when a figure was measured."""

import datetime
import platform
import resource
import shlex
import sys

import torch


def description(device: torch.device) -> dict[str, str | int]:
    """Machine, versions, date and command, as every figure carries them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held on the device so far, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / 1e6


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return platform.processor()
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    return f"{names[0]} ({len(names)} threads)" if names else platform.processor()


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]
