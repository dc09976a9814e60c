"""How many graphs `torch.compile` keeps of a function, on every version of torch."""

import torch

# Each number of rows and tokens has a graph of its own, and so have training and inference.
# torch's default, 8, ends a compiled training or leaves it uncompiled.
MAX_GRAPHS = 64


def allow_graphs() -> None:
    """Let there be `MAX_GRAPHS` of each function; called before something is compiled.

    Only newer versions of torch have an argument for it. There this setting belongs to the thread.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(MAX_GRAPHS, config.recompile_limit)
    config.accumulated_recompile_limit = max(MAX_GRAPHS, config.accumulated_recompile_limit)
