"""Weights spread over processes (FSDP2), applied to the network from outside.

`shard` cuts every parameter along its first dimension and gives each process a piece, a `DTensor`.
A layer's whole weights exist only while it computes. The other functions turn pieces into whole
tensors and back, and take plain tensors as they are, so that their callers need not ask.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .dit import DIT


def shard(network: DIT, mesh: DeviceMesh) -> None:
    """Shard a network in place, block by block; doing it again changes nothing.

    All processes must hold equal weights: each keeps its piece of its own.

    Args:
        network: with its weights on the CPU or on this process's device.
        mesh: one-dimensional, the processes.
    """
    if isinstance(network, FSDPModule):
        return
    # The outermost module too is cut again after a forward pass: otherwise `parameters()` are the
    # pieces after a training step and the whole weights after a validation step.
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def local(tensor: Tensor) -> Tensor:
    """This process's piece, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of a cut tensor on the first process's CPU, for a file, and nothing on the others.

    All processes must call this. What is not cut is returned as it is.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if dist.get_rank() == 0 else gathered.new_empty(0)


@torch.no_grad()
def placed_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, on the device and cut as the example is."""
    tensor = tensor.to(example.device)
    if not isinstance(example, DTensor):
        return tensor
    # Each process cuts its own piece out of what it has: nothing is sent.
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
