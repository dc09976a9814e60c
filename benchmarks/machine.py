"""Where and when a figure was measured."""

import datetime
import gc
import platform
import shlex
import sys
from pathlib import Path

import torch

from training.manifest import device_name
from utils import json_text


def description(device: torch.device) -> dict[str, str | int]:
    """Machine, versions, date and command, as every figure carries them."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
    }


def write_json(path: Path, record: dict) -> None:
    """Write a record, into a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(record, indent=2) + "\n")


def start_memory_measurement(device: torch.device) -> float:
    """Forget earlier peaks; the memory in use now, in MB (on a CPU of the whole process)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use
    return _status_mb("VmRSS")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory in use since `start_memory_measurement`, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _status_mb("VmHWM")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux alone")


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]
