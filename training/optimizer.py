"""The optimizer of a training: AdamW as one kernel over all weights."""

from collections.abc import Iterable
from typing import Any

import torch
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
    _make_state(optimizer)
    return optimizer


def _make_state(optimizer: AdamW) -> None:
    """Make the moments now, as torch would after the first backward pass.

    There they would lie for good between what that pass leaves free, and split the memory that all
    later steps need in large blocks: a quarter more of it on a CPU.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _keep_fused(_optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    # The groups of a checkpoint replace the optimizer's, and say how the run before it computed.
    groups = [group | {"fused": True, "foreach": None} for group in state["param_groups"]]
    return state | {"param_groups": groups}
