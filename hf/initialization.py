"""How tensors of the Hugging Face model start that a file did not bring."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from models.dit import EmbeddingLayer, LayerNorm
from models.plain import is_plain
from models.rotary import Rotary


@torch.no_grad()
def initialise(module: nn.Module, *, model: PreTrainedModel) -> None:
    """The network's own initialisation of a module's tensors, those of its children left out.

    Args:
        module: a part of `model`, or `model` itself for its range of t.
        model: a `BD3LM`.
    """
    if any(module is layer for layer in _zero_layers(model)):
        init.zeros_(module.weight)
        init.zeros_(module.bias)
    elif is_plain(module, nn.Linear):
        module.reset_parameters()
    elif isinstance(module, EmbeddingLayer):
        init.kaiming_uniform_(module.embedding, a=5**0.5)
    elif isinstance(module, LayerNorm):
        init.ones_(module.weight)
    elif isinstance(module, Rotary):
        init.copy_(module.inv_freq, module.frequencies())
    elif module is model and model.config.var_min:
        init.constant_(model.sampling_eps_min, model.config.sampling_eps_min)
        init.constant_(model.sampling_eps_max, model.config.sampling_eps_max)


def _zero_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers that start at zero: a fresh block does nothing, as in `DIT`."""
    output_layer = model.backbone.output_layer
    modulated = [*model.backbone.blocks, output_layer] if model.config.adaln else []
    return [output_layer.linear, *(layer.adaLN_modulation for layer in modulated)]
