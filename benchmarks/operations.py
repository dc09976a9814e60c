"""Counts the operations that a piece of code hands to the device, on any device."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Reading a number, and finding out how many elements a mask selects: a GPU's CPU waits for both.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select")
# Give memory, or another view of it, and compute nothing.
_FREE = ("empty", "detach", "alias", "_unsafe_view", "lift_fresh", "new_empty", "_reshape_alias")


class Operations(TorchDispatchMode):
    """While it is entered, counts the operations by name.

    Attributes:
        computed: those that compute, each a kernel of a GPU or a few.
        waits: those for whose result a CPU would wait: `WAITS`, and an index by a boolean mask.
    """

    def __init__(self):
        super().__init__()
        self.computed: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        elif name.startswith("index") and _is_boolean(args):
            self.waits["nonzero"] += 1
        if not function.is_view and not name.startswith(_FREE) and name != WAITS[0]:
            self.computed[name] += 1
        return function(*args, **(kwargs or {}))


def _is_boolean(args: tuple) -> bool:
    """Whether `index` or `index_put` is given a mask."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
