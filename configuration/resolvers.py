"""OmegaConf resolvers: what `${name:...}` in the YAML files computes."""

import os
from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from configuration.run_directory import claim_directory

# Rows are prepared beforehand: more processes than this only take memory.
_MOST_WORKERS = 16


def div_up(numerator: int, denominator: int) -> int:
    """Returns the quotient of two integers, rounded up."""
    return -(-numerator // denominator)


def sub(left: float, right: float) -> float:
    """Returns left - right."""
    return left - right


def device_count() -> int:
    """Returns the number of GPUs, or 1 where there is none: the CPU is one device."""
    return max(1, torch.cuda.device_count())


def num_cpus() -> int:
    """Returns the number of CPUs this process may use, which Slurm and containers restrict."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        return os.cpu_count() or 1


def default_num_workers(devices: int, accelerator: str) -> int:
    """Returns how many processes may load data beside each device's own without crowding it.

    Args:
        devices: of this node; each has a process, and they share the CPUs.
        accelerator: of `trainer`. On a CPU torch computes on as many threads as it has; a process
            with a GPU keeps one CPU busy.
    """
    cpus = num_cpus()
    # Slurm may have given each process CPUs of its own, which are all it sees.
    has_own = os.environ.get("SLURM_CPUS_PER_TASK") == str(cpus)
    share = cpus if has_own else cpus // devices
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    busy = torch.get_num_threads() if on_cpu else 1
    return min(_MOST_WORKERS, max(0, share - busy))


def default_accelerator() -> str:
    """Returns the Lightning accelerator of this machine: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def devices_per_node(devices: int | str | Sequence[int], accelerator: str) -> int:
    """Counts the devices that `trainer.devices` asks for: 2, "2", -1, "auto", [0, 1] or "0,1".

    Raises:
        ValueError: the value has none of these forms.
    """
    if isinstance(devices, str) and "," in devices:
        return sum(1 for index in devices.split(",") if index.strip())
    if isinstance(devices, list | ListConfig) and len(devices) > 0:
        return len(devices)
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return 1 if accelerator == "cpu" else device_count()
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ValueError(
        f"trainer.devices={devices}: allowed are a positive integer, a list of device indices, "
        "auto and -1 (all)"
    )


def fast_precision() -> str:
    """Returns mixed bf16 where the hardware multiplies bf16 faster than float32, else float32."""
    has_fast_bf16 = (
        torch.cuda.is_available()
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    return "bf16-mixed" if has_fast_bf16 else "32-true"


def accumulation(global_batch_size: int, world: int, batch_size: int | str) -> int:
    """Returns the batches of an optimizer step; 1 as long as `batch_size` is still to be found."""
    return 1 if batch_size == "auto" else div_up(global_batch_size, world * batch_size)


def world_size(trainer: DictConfig) -> int:
    """Returns the number of processes of a run, from the section `trainer`."""
    return devices_per_node(trainer["devices"], trainer["accelerator"]) * trainer["num_nodes"]


def _world_size_of_run(*, _root_: DictConfig) -> int:
    """The resolver `${world_size:}`; OmegaConf hands it the whole configuration as `_root_`."""
    return world_size(_root_["trainer"])


def _num_workers_of_run(*, _root_: DictConfig) -> int:
    """The resolver `${num_workers:}`."""
    trainer = _root_["trainer"]
    return default_num_workers(
        devices_per_node(trainer["devices"], trainer["accelerator"]), trainer["accelerator"]
    )


def register_resolvers() -> None:
    """Registers every resolver the YAML files use; calling it again changes nothing."""
    resolvers: dict[str, Callable] = {
        "accelerator": default_accelerator,
        "accumulation": accumulation,
        "claimed": claim_directory,
        "cwd": os.getcwd,
        "device_count": device_count,
        "div_up": div_up,
        "fast_precision": fast_precision,
        "num_cpus": num_cpus,
        "num_workers": _num_workers_of_run,
        "sub": sub,
        "world_size": _world_size_of_run,
    }
    for name, function in resolvers.items():
        # A directory is claimed once, however often a configuration is read.
        use_cache = function is claim_directory
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=use_cache)
