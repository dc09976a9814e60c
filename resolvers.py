"""OmegaConf resolvers: what `${name:...}` in the YAML files computes."""

import os
from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf


def div_up(numerator: int, denominator: int) -> int:
    """Returns the quotient of two integers, rounded up."""
    return -(-numerator // denominator)


def mul(*factors: float) -> float:
    """Returns the product of all arguments."""
    product = 1
    for factor in factors:
        product *= factor
    return product


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


def world_size(trainer: DictConfig) -> int:
    """Returns the number of processes of a run, from the section `trainer`."""
    return devices_per_node(trainer["devices"], trainer["accelerator"]) * trainer["num_nodes"]


def _world_size_of_run(*, _root_: DictConfig) -> int:
    """The resolver `${world_size:}`; OmegaConf hands it the whole configuration as `_root_`."""
    return world_size(_root_["trainer"])


def register_resolvers() -> None:
    """Registers every resolver the YAML files use; calling it again changes nothing."""
    resolvers: dict[str, Callable] = {
        "accelerator": default_accelerator,
        "cwd": os.getcwd,
        "device_count": device_count,
        "div_up": div_up,
        "fast_precision": fast_precision,
        "mul": mul,
        "num_cpus": num_cpus,
        "sub": sub,
        "world_size": _world_size_of_run,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
