"""What every process of a run learns of the others without waiting for them."""

import torch
import torch.distributed as dist


class Question:
    """Asks all processes for a number now, and has the highest of them later.

    A collective operation: all processes ask in the same order. Asked at the end of one step and
    read at the end of the next, the answer has long arrived. On a GPU it is copied to the CPU as
    soon as the device has it, so that reading waits for the step that is over, and the one that
    has been queued since goes on meanwhile.

    Args:
        number: this process's own.
        device: of the processes' collective operations.
    """

    def __init__(self, number: int, *, device: torch.device):
        self._answer = torch.full((), number, device=device)
        work = dist.all_reduce(self._answer, op=dist.ReduceOp.MAX, async_op=True)
        if device.type == "cuda":
            work.wait()  # what the stream does, not the CPU
            on_cpu = torch.empty_like(self._answer, device="cpu", pin_memory=True)
            self._answer = on_cpu.copy_(self._answer, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
            self._wait = arrival.synchronize
        else:
            self._wait = work.wait

    def highest(self) -> int:
        """The highest number that a process gave; waits where it has not arrived."""
        self._wait()
        return int(self._answer)
