"""AdamW as one kernel over all weights, and a learning rate that torch has not."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


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


def use_settings(
    optimizer: Optimizer, scheduler: LRScheduler, *, lr: float, **settings: Any
) -> None:
    """Go on with these, after a checkpoint has put its own in their place.

    Args:
        optimizer: restored.
        scheduler: of its learning rate, restored. It goes on from where it is, on its own curve.
        lr: the peak.
        settings: others of the optimizer (`betas`, `eps`, `weight_decay`).
    """
    for place, group in enumerate(optimizer.param_groups):
        if isinstance(scheduler, LambdaLR):
            rate = lr * scheduler.lr_lambdas[place](scheduler.last_epoch)
        else:  # the next one follows from this one
            rate = group["lr"] * (lr / group["initial_lr"])
        group |= settings | {"lr": rate, "initial_lr": lr}
        scheduler.base_lrs[place], scheduler._last_lr[place] = lr, rate


def cosine_decay_with_warmup(
    optimizer: Optimizer,
    *,
    t_initial: int,
    warmup_t: int,
    warmup_lr_init: float,
    lr_min: float,
    warmup_prefix: bool = True,
) -> LambdaLR:
    """Linear warm-up from warmup_lr_init, then half a cosine down to lr_min, which stays.

    Args:
        optimizer: its learning rates are the peak.
        t_initial: length of the cosine in steps.
        warmup_t: length of the warm-up in steps.
        warmup_lr_init: learning rate at step 0.
        lr_min: learning rate after the cosine.
        warmup_prefix: the cosine starts after the warm-up; otherwise it counts from step 0.
    """

    def schedule(peak: float):
        def factor(step: int) -> float:
            if step < warmup_t:
                return (warmup_lr_init + (peak - warmup_lr_init) * step / warmup_t) / peak
            done = min((step - warmup_t * warmup_prefix) / t_initial, 1.0)
            return (lr_min + (peak - lr_min) * 0.5 * (1 + math.cos(math.pi * done))) / peak

        return factor

    return LambdaLR(optimizer, [schedule(group["lr"]) for group in optimizer.param_groups])
