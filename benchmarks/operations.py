"""Counts the operations that a piece of code hands to the device, on any device."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Reading a number, finding out how many elements a mask selects, and whether all are equal.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
# These look for the elements of a mask where an index is one.
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# Give memory, or another view of it, and compute nothing.
_FREE = ("empty", "detach", "alias", "_unsafe_view", "lift_fresh", "new_empty", "_reshape_alias")


class Operations(TorchDispatchMode):
    """While it is entered, counts the operations by name.

    Attributes:
        computed: those that compute, each a kernel of a GPU or a few.
        waits: those for whose result a CPU would wait; an index by a mask is a `nonzero`.
    """

    def __init__(self):
        super().__init__()
        self.computed: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if waits(name, args):
            self.waits["nonzero" if name in _INDEXING else name] += 1
        if not function.is_view and not name.startswith(_FREE) and name != WAITS[0]:
            self.computed[name] += 1
        return function(*args, **(kwargs or {}))


def waits(name: str, args: tuple) -> bool:
    """Whether a GPU's CPU waits for the result of the operation of this name."""
    indices = [i for i in args[1] if i is not None] if name in _INDEXING else []
    return name in WAITS or any(i.dtype in (torch.bool, torch.uint8) for i in indices)
