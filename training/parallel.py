"""Several processes: `strategy=fsdp`, and how all of them end.

With fsdp weights, gradients and optimizer state are spread over the processes: Lightning's
`ModelParallelStrategy` with FSDP2, which clips gradients by norm and also runs on a CPU, with
checkpoints in the format of every other run: one file of whole tensors.
"""

import gc
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from models.sharding import placed_like


def in_words_of_this_torch(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section `strategy`, whose `forward_sync_buffers` older versions call `broadcast_buffers`.

    To newer ones that name is deprecated.
    """
    found = dict(section)
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    if "forward_sync_buffers" in found and "forward_sync_buffers" not in known:
        found["broadcast_buffers"] = found.pop("forward_sync_buffers")
    return found


class ShardedStrategy(ModelParallelStrategy):
    """Shards over all processes; files go through the `CheckpointIO` of the trainer.

    Lightning's own saving and loading of such models bypass it, and with it fsspec's places.
    """

    def __init__(self, **arguments: Any):
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, **arguments
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None
    ) -> None:
        """Write the checkpoint, which the first process alone holds, from there."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of any strategy on every process, each keeping its pieces of it."""
        checkpoint = ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)
        set_model_state_dict(
            self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True)
        )
        if self.optimizers:
            states = checkpoint["optimizer_states"]
            for optimizer, state in zip(self.optimizers, states, strict=True):
                load_optimizer_state(optimizer, state)
        return checkpoint


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors, positional as torch writes it, into sharded parameters.

    Args:
        optimizer: of parameters that may be sharded.
        state: `Optimizer.state_dict()` of the same parameters, not sharded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(value: Any, *, index: int) -> Any:
        is_of_parameter = torch.is_tensor(value) and value.shape == parameters[index].shape
        return placed_like(value, parameters[index]) if is_of_parameter else value

    placed_state = {
        index: {name: placed(value, index=index) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": placed_state, "param_groups": state["param_groups"]})


def leave_process_group() -> None:
    """End what connects the processes, if anything does; call it when no trainer is left.

    A gradient's all-reduce may still be held by a thread of gloo when Python ends, which then
    aborts the process. The threads end with the group, and the group when no module refers to it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # trainers and their modules refer to each other
        torch.distributed.destroy_process_group()
