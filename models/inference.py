"""The network as samplers run it: no time, no gradients, nothing computed twice.

`DIT.forward` is the readable form; this one gives the same numbers up to rounding, which tests
check. What it saves: the network is told sigma = 0 in every pass, so all modulations are constants,
folded into the norms; the weights are in the precision of the products once and for all; behind the
last attention only the tokens remain whose logits somebody asked for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.packed_linear import PackedLinear, can_pack

from .dit import (
    DIT,
    DITBlock,
    EmbeddingLayer,
    LayerNorm,
    Modulation,
    OutputLayer,
    SigmaEmbedder,
    attend_heads,
    flat_positions,
    matmul_dtype,
    split_heads,
    weights_dtype,
)
from .kv_cache import KVCache
from .masks import AttentionPattern
from .plain import is_plain
from .rotary import Rotary

_PARTS = (
    DIT, DITBlock, EmbeddingLayer, LayerNorm, OutputLayer, SigmaEmbedder, Rotary,
    nn.GELU, nn.Linear, nn.ModuleList, nn.Sequential, nn.SiLU, PackedLinear,
)  # fmt: skip


def can_be_read(network: nn.Module) -> bool:
    """Whether `InferenceDIT` may read this network's weights: all its parts are those of `DIT`.

    A part with an adapter, quantized, sharded or hooked must be called, see `plain`. In float64,
    which `InferenceDIT` does not keep, somebody compares numbers.
    """
    is_double = weights_dtype(network) == torch.float64
    return not is_double and all(is_plain(module, *_PARTS) for module in network.modules())


def cast_matrices(network: nn.Module, dtype: torch.dtype, *, packs: bool = True) -> None:
    """Keep the weights of plain linear layers in this precision, in place; packed where that pays.

    Under autocast of the same precision the results do not change; the copies that autocast would
    make of the weights are spared. For a network that is not trained or saved any more.

    Args:
        network, dtype: see above.
        packs: False for a network that will be compiled, see `PackedLinear`.
    """
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if is_plain(layer, nn.Linear):
                layer.to(dtype)
                if packs and can_pack(layer.weight):
                    setattr(module, name, PackedLinear(layer.weight, layer.bias))


@dataclass(frozen=True)
class Norm:
    """A layer norm with its modulation folded in: norm(x) w (1 + scale) + shift."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def fold(cls, norm: LayerNorm, modulation: Modulation) -> "Norm":
        weight = norm.weight.float()
        if modulation.shift is None:
            return cls(weight, None)
        shift, scale = modulation.shift.flatten().float(), modulation.scale.flatten().float()
        return cls(weight * (1 + scale), shift)

    def __call__(self, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias).to(dtype)


@dataclass(frozen=True)
class Linear:
    """Weight (out, in) and bias (out,) or None, in the precision of the products."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def cast(
        cls, layer: nn.Linear | PackedLinear, *, dtype: torch.dtype, packs: bool
    ) -> "Linear | PackedLinear":
        if isinstance(layer, PackedLinear):
            return layer
        weight, bias = layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
        return PackedLinear(weight, bias) if packs and can_pack(weight) else cls(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU, in its approximation by tanh, of the output."""
        return F.gelu(self(x), approximate="tanh")


class InferenceBlock:
    """A `DITBlock` with constant modulations.

    Args:
        block: the layer.
        condition: of sigma = 0, (1, 1, C), or None.
        dtype: of the matrix products.
        packs: see `InferenceDIT`.
    """

    def __init__(
        self, block: DITBlock, *, condition: Tensor | None, dtype: torch.dtype, packs: bool
    ):
        attn, feed_forward = block.modulations(condition)
        self.dtype = dtype
        self.norm1, self.norm2 = Norm.fold(block.norm1, attn), Norm.fold(block.norm2, feed_forward)
        self.gate1, self.gate2 = _vector(attn.gate), _vector(feed_forward.gate)
        how = {"dtype": dtype, "packs": packs}
        self.attn_qkv = Linear.cast(block.attn_qkv, **how)
        self.attn_out = Linear.cast(block.attn_out, **how)
        self.up, self.down = Linear.cast(block.mlp[0], **how), Linear.cast(block.mlp[2], **how)

    def qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values (B, T, 3 D) of the residual (B, T, D)."""
        return self.attn_qkv(self.norm1(x, dtype=self.dtype))

    def add(self, x: Tensor, heads: Tensor) -> Tensor:
        """The residual (..., D) with the attention's output and the feed-forward network's."""
        x = _add(x, self.attn_out(heads), gate=self.gate1)
        h = self.up.gelu(self.norm2(x, dtype=self.dtype))
        return _add(x, self.down(h), gate=self.gate2)


def _vector(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.flatten().float()


def _add(x: Tensor, h: Tensor, *, gate: Tensor | None) -> Tensor:
    return x + h if gate is None else torch.addcmul(x, h, gate)


class InferenceDIT:
    """Called as `DIT` is, without sigma.

    Args:
        network: shares its weights where they already have the right form, else casts copies;
            `can_be_read` says whether it may.
        packs: keep weights packed where that pays; the compiler cannot take them.

    Attributes:
        network, blocks, norm_final, head: the original, and its parts in their new form.
        dtype: of the matrix products: autocast's at the time of the making, or the weights' own.
            The residual stream, norms and the embedding are float32.
    """

    @torch.no_grad()
    def __init__(self, network: DIT, *, packs: bool = True):
        self.network, self.config = network, network.config
        embedding, head = network.vocab_embed.embedding, network.output_layer
        self.dtype = matmul_dtype(head.linear.weight)
        is_mixed = self.dtype != torch.float32
        with torch.autocast(embedding.device.type, dtype=self.dtype, enabled=is_mixed):
            condition = network.condition(None, indices=embedding)
            shared = {"condition": condition, "dtype": self.dtype, "packs": packs}
            self.blocks = [InferenceBlock(block, **shared) for block in network.blocks]
            self.norm_final = Norm.fold(head.norm_final, head.modulation(condition))
        self.head = Linear.cast(head.linear, dtype=self.dtype, packs=packs)

    @torch.no_grad()
    def __call__(
        self,
        indices: Tensor,
        sigma: None = None,
        *,
        pattern: AttentionPattern,
        kv_cache: KVCache | None = None,
        positions: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean token at each position; see `DIT.forward`.

        Args:
            indices: token ids (B, T), int64.
            sigma: None, which means 0.
            pattern: any but `BLOCK_DIFFUSION`, which is for training.
            kv_cache, positions, logits_at: as in `DIT.forward`.

        Returns:
            Logits (B, T, V); with `logits_at` (n_selected, V).

        Raises:
            ValueError: if there is a sigma.
        """
        if sigma is not None:
            raise ValueError("InferenceDIT: sigma is 0 here; DIT takes others")
        if positions is None:
            start = 0 if kv_cache is None else kv_cache.num_tokens
            positions = torch.arange(start, start + indices.shape[1], device=indices.device)
        with torch.autocast(indices.device.type, enabled=False):
            return self._forward(
                indices,
                *self.network.rotary_emb(positions),
                pattern=pattern,
                kv_cache=kv_cache,
                logits_at=logits_at,
            )

    def _forward(
        self,
        indices: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        pattern: AttentionPattern,
        kv_cache: KVCache | None,
        logits_at: Tensor | None,
    ) -> Tensor:
        x = self.network.vocab_embed(indices).float()
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            q, k, v = split_heads(block.qkv(x), n_heads=self.config.n_heads, cos=cos, sin=sin)
            heads = attend_heads(
                q, k, v, config=self.config, pattern=pattern, layer=layer, kv_cache=kv_cache
            )
            if layer == last and logits_at is not None:
                at = flat_positions(logits_at)
                x, heads = x.flatten(0, 1)[at], heads.flatten(0, 1)[at]  # (n_selected, D)
            x = block.add(x, heads)
        return self.head(self.norm_final(x, dtype=self.dtype))

    def make_cache(self, batch_size: int, *, capacity: int) -> KVCache:
        """An empty cache for this network."""
        return self.network.make_cache(batch_size, capacity=capacity, dtype=self.dtype)
