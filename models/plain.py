"""Which layers are no more than what the network was built of.

Fast paths read weights instead of calling layers. That is right only for a layer that computes what
its type says: adapters (PEFT), quantized layers, parametrizations and hooks change what a call
computes and leave the weights as they are.
"""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these types, and calling it runs their `forward`."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return type(module) in types and not any(hooks) and not _is_replaced(module)


def _is_replaced(module: nn.Module) -> bool:
    """Whether another `forward` was put on this module; one that recomputes is still its own."""
    forward = vars(module).get("forward")
    is_recomputed = isinstance(forward, functools.partial) and forward.func is checkpoint
    return forward is not None and not is_recomputed
