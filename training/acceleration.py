"""`training.compile` and `training.activation_checkpointing`, put on the network from outside.

Both replace methods of single layers and no module, so that the names of weights stay.

Layers are compiled, not the network: all of them share two graphs, so the time that compiling takes
does not grow with their number, and the kernels are those of a whole graph. Attention stays outside
of the graphs. FlexAttention compiles itself, the CPU's slices and SDPA are single operators, and
their masks come out of a cache that a compiler would not know and build in every step. Of the head
it is what lies between its matrix products, and on a GPU alone (`models.kernels.large_head`).
"""

import functools
import os
import shutil

import torch
from torch.utils.checkpoint import checkpoint

from models.compiling import allow_graphs
from models.dit import DIT
from utils import get_logger

logger = get_logger(__name__)


def is_compiled(setting: bool | str, *, device: torch.device) -> bool:
    """Whether `training.compile` (true, false or auto) compiles on a device.

    On a CPU compiling takes longer than it saves in a short run: only where asked for.
    """
    return device.type == "cuda" if setting == "auto" else bool(setting)


def warn_without_c_compiler(device: torch.device) -> None:
    """Say early what Triton, which makes a GPU's kernels, will say after a while and at length."""
    has_compiler = "CC" in os.environ or shutil.which("gcc") or shutil.which("clang")
    if device.type == "cuda" and not has_compiler:
        logger.warning(
            "No C compiler is found (gcc, clang or what CC names), without which Triton fails with "
            "'Failed to find C compiler': install gcc, or use training.compile=false and "
            "model.attn_backend=sdpa"
        )


def compile_layers(network: DIT) -> None:
    """Compile the layers in place, with static shapes; doing it again changes nothing."""
    allow_graphs()
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    for block in network.blocks:
        if "project" not in vars(block):
            block.project, block.add = compiled(block.project), compiled(block.add)
    network.output_layer.is_compiled = True


def checkpoint_layers(network: DIT) -> None:
    """Keep of each layer its input alone; the backward pass computes the rest once more.

    Random numbers are drawn again as they were: gradients are the same, with dropout too. Doing it
    again changes nothing.
    """
    for block in network.blocks:
        if "forward" not in vars(block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
