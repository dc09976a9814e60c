"""Rows of the vocabulary added to a model: new tokens behind the others, the mask at its id."""

import dataclasses
import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.dit import EmbeddingLayer
from models.plain import is_plain

logger = logging.getLogger(__name__)


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel, vocab_size: int) -> None:
    """Gives a model ids up to `vocab_size`; each new one starts as the mean of the old ones.

    No token changes its id, the mask included.

    Args:
        model: a `BD3LM`.
        vocab_size: V of the grown model, the mask counted.

    Raises:
        ValueError: if there would be fewer than now, or adapters are on the layers already.
    """
    old, mask = model.config.vocab_size, model.config.mask_index
    is_last = mask == old - 1
    how = (
        f"the mask is id {mask}, and a tokenizer that does not know it counts one less: "
        "tokenizer.add_special_tokens({'mask_token': '[MASK]'}) gives it that id"
    )
    if vocab_size < old:
        raise ValueError(
            f"resize_token_embeddings({vocab_size}): allowed are numbers from {old}"
            + (f"; {how}" if is_last else "")
        )
    if vocab_size == old:
        if is_last:
            logger.warning("resize_token_embeddings(%d): nothing to do; %s", old, how)
        return
    backbone = model.backbone
    embed, head = backbone.vocab_embed, backbone.output_layer.linear
    if not (is_plain(embed, EmbeddingLayer) and is_plain(head, nn.Linear)):
        raise ValueError(
            "resize_token_embeddings: allowed before adapters, quantization or hooks are added"
        )
    embed.embedding = _grown(embed.embedding, vocab_size)
    head.weight = _grown(head.weight, vocab_size)
    if head.bias is not None:
        head.bias = _grown(head.bias, vocab_size)
    head.out_features = vocab_size
    config = dataclasses.replace(backbone.config, vocab_size=vocab_size)
    for module in (backbone, *backbone.blocks):
        module.config = config
    model.config.vocab_size = vocab_size


def _grown(parameter: nn.Parameter, num_rows: int) -> nn.Parameter:
    """(V, ...) with rows of the mean behind it."""
    mean: Tensor = parameter.mean(dim=0, keepdim=True)
    added = mean.expand(num_rows - len(parameter), *parameter.shape[1:])
    return nn.Parameter(torch.cat((parameter, added)), requires_grad=parameter.requires_grad)


def as_embedding_layer(layer: nn.Module) -> nn.Module:
    """An `nn.Embedding` under the names of checkpoints, sharing its weights; others as they are."""
    if not is_plain(layer, nn.Embedding):
        return layer
    with torch.device("meta"):
        found = EmbeddingLayer(*layer.weight.shape)
    found.embedding = layer.weight
    return found
