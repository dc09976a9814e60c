"""The optimizer of a training: AdamW as one kernel over all weights."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer


def fused_adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> AdamW:
    """AdamW in torch's fused form, which CPUs and GPUs have, for sharded weights too.

    It reads checkpoints of the other forms and goes on fused.
    """
    optimizer = AdamW(
        parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )
    # Says that the optimizer itself undoes the loss scaling of float16, whereupon Lightning refuses
    # to clip gradients, in bf16 too. Without it the scaler undoes it before they are clipped.
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(_optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # The groups of a checkpoint replace the optimizer's, and say how the run before it computed.
    groups = [group | {"fused": True, "foreach": None} for group in state["param_groups"]]
    return state | {"param_groups": groups}
