"""The denoising network: a diffusion transformer with adaptive layer norm and rotary positions.

Parameter names and their order are file formats (a checkpoint's EMA and optimizer state are
positional): a test freezes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels.chunked_head import TargetScores, called_target_scores, target_scores
from models.kernels.dropout import dropout
from models.kernels.gelu_linear import gelu_linear

from .attention import attend
from .kv_cache import CleanHalf, KVCache
from .masks import AttentionPattern
from .plain import is_plain
from .rotary import Rotary, rotate

# Positions whose logits are held together where somebody reads them, see `Target`: 50,257 numbers
# each.
_READ_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class DITConfig:
    """Sizes and switches of the network.

    `vocab_size` counts the mask token, `block_size` is L. `adaln=False` builds the network without
    conditioning on sigma (AR).
    """

    vocab_size: int
    block_size: int
    hidden_size: int
    cond_dim: int
    n_blocks: int
    n_heads: int
    dropout: float = 0.1
    adaln: bool = True
    attn_backend: str = "auto"

    def __post_init__(self):
        if self.hidden_size % (2 * self.n_heads):
            raise ValueError(
                f"model.hidden_size={self.hidden_size}: must be a multiple of 2 x "
                f"model.n_heads={self.n_heads}, rotary heads have an even size"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads


class Modulation(NamedTuple):
    """Adaptive layer norm of one sub-layer; each broadcasts against (B, T, D). None: identity."""

    shift: Tensor | None
    scale: Tensor | None
    gate: Tensor | None

    def modulate(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x * (1 + self.scale) + self.shift

    def first(self, num_tokens: int) -> "Modulation":
        """Of the first tokens alone; a slice of one row for all is that row."""
        return Modulation(*(part if part is None else part[:, :num_tokens] for part in self))


IDENTITY = Modulation(None, None, None)


class LayerNorm(nn.Module):
    """Layer norm without bias, then its modulation, in float32 also where products are in half."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, modulation: Modulation = IDENTITY) -> Tensor:
        """norm(x) w (1 + scale) + shift of (..., D)."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            weight, bias = self.weight.to(dtype), None
            is_constant = modulation.shift is not None and modulation.shift.numel() == len(weight)
            if is_constant:
                # One operation on the tokens instead of three, of which a backward pass would
                # keep the results.
                weight = weight * (1 + modulation.scale.flatten().to(dtype))
                bias = modulation.shift.flatten().to(dtype)
            normed = F.layer_norm(x.to(dtype), weight.shape, weight, bias)
        return normed if is_constant else modulation.modulate(normed)


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The precision of matrix products right now: autocast's, or that of the weight."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def weights_dtype(module: nn.Module) -> torch.dtype:
    """The precision that a module's weights have, of which quantized ones are no example."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


class Target(NamedTuple):
    """The tokens that are asked for, where nobody needs to hold all logits.

    Attributes:
        tokens: ids (n_selected,), or (B, T) without a selection.
        excluded: id of a token that has no probability: the mask.
        read: what to know of logits (m, V) and the tokens (m,), each (m,), for some positions after
            the other. None: the scores of the tokens, which is all that a loss needs.
    """

    tokens: Tensor
    excluded: int
    read: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None


class EmbeddingLayer(nn.Module):
    """Token embeddings (V, D), not tied to the output head."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    @property
    def weight(self) -> nn.Parameter:
        """The name that others, such as PEFT, know it by."""
        return self.embedding

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.embedding)


class SigmaEmbedder(nn.Module):
    """sigma -> conditioning vector: sinusoidal features and a two-layer perceptron."""

    NUM_FEATURES = 256
    MAX_PERIOD = 10_000.0

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.NUM_FEATURES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma (...,) float -> (..., C)."""
        half = self.NUM_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma.float()[..., None] * torch.exp(-math.log(self.MAX_PERIOD) * steps)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(features.to(torch.promote_types(weights_dtype(self), torch.float32)))


def split_heads(
    qkv: Tensor, *, n_heads: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys and values, each (B, H, T, d), of (B, T, 3 D).

    In memory the heads of a token lie side by side, and so do those of the attention's output:
    the product behind it needs no copy.
    """
    heads = qkv.unflatten(-1, (3, n_heads, -1))  # (B, T, 3, H, d)
    both, v = heads.split((2, 1), dim=2)  # a gradient of parts is put together in one go
    cos, sin = cos[:, 0, :, None, None], sin[:, 0, :, None, None]  # (B or 1, T, 1, 1, d/2)
    q, k = rotate(both, cos=cos, sin=sin).unbind(dim=2)
    # A view would keep all of qkv for the backward pass.
    return q.transpose(1, 2), k.transpose(1, 2), v.squeeze(2).contiguous().transpose(1, 2)


def attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: DITConfig,
    pattern: AttentionPattern,
    layer: int,
    kv_cache: KVCache | CleanHalf | None,
) -> Tensor:
    """What all heads read, side by side (B, T, D), for (B, H, T, d); with a cache, from it too."""
    if kv_cache is not None:
        k, v = kv_cache.append(layer, k=k, v=v)
    out = attend(
        q, k, v, pattern=pattern, block_size=config.block_size, backend=config.attn_backend
    )
    return out.transpose(1, 2).flatten(2)


class DITBlock(nn.Module):
    """Attention and a feed-forward network, each modulated, gated and added to the residual."""

    def __init__(self, config: DITConfig):
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        if config.adaln:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * dim)
            nn.init.zeros_(self.adaLN_modulation.weight)
            nn.init.zeros_(self.adaLN_modulation.bias)

    def modulations(self, condition: Tensor | None) -> tuple[Modulation, Modulation]:
        """Of the attention and of the feed-forward network, from (B or 1, T or 1, C)."""
        if condition is None:
            return IDENTITY, IDENTITY
        parts = self.adaLN_modulation(condition).chunk(6, dim=-1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        pattern: AttentionPattern,
        layer: int,
        kv_cache: KVCache | CleanHalf | None,
        num_outputs: int | None = None,
    ) -> Tensor:
        """One layer on (B, T, D); `cos` and `sin` as `Rotary` makes them.

        With `num_outputs` only the first ones come out; the others have been keys and values.
        """
        attn, feed_forward = self.modulations(condition)
        q, k, v = self.project(x, attn, cos=cos, sin=sin)
        if num_outputs is not None:
            attn, feed_forward = attn.first(num_outputs), feed_forward.first(num_outputs)
            q, x = q[:, :, :num_outputs], x[:, :num_outputs]
        heads = attend_heads(
            q, k, v, config=self.config, pattern=pattern, layer=layer, kv_cache=kv_cache
        )
        return self.add(x, heads, attn, feed_forward)

    # What comes before and after the attention is compiled, see `training.acceleration`: these two
    # take tensors of fixed shapes, and know no masks, patterns or caches.

    def project(
        self, x: Tensor, modulation: Modulation, *, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (B, H, T, d), of (B, T, D)."""
        qkv = self.attn_qkv(self.norm1(x, modulation))
        return split_heads(qkv, n_heads=self.config.n_heads, cos=cos, sin=sin)

    def add(self, x: Tensor, heads: Tensor, attn: Modulation, feed_forward: Modulation) -> Tensor:
        """x (B, T, D) plus what the heads read (B, T, D), and then plus the feed-forward."""
        x = self.plus(x, self.attn_out(heads), gate=attn.gate)
        h = self.feed_forward(self.norm2(x, feed_forward))
        return self.plus(x, h, gate=feed_forward.gate)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward network of (B, T, D), in its saving form where no layer was changed."""
        # A compiler decides itself what is computed anew.
        if torch.compiler.is_compiling() or not is_plain(self.mlp, nn.Sequential):
            return self.mlp(x)
        up, act, down = self.mlp
        if not (is_plain(act, nn.GELU) and is_plain(down, nn.Linear)):
            return self.mlp(x)
        return gelu_linear(up(x), down)

    def plus(self, x: Tensor, h: Tensor, *, gate: Tensor | None) -> Tensor:
        """x plus what is left of h by dropout, gated."""
        h = dropout(h, p=self.config.dropout, training=self.training)
        return x + h if gate is None else torch.addcmul(x, h, gate)


def flat_positions(at: Tensor) -> Tensor:
    """Positions (n,) among B N tokens, row after row, of these or of a boolean (B, N).

    Where they are given nobody waits for the device to count them.
    """
    return at.flatten().nonzero()[:, 0] if at.dtype == torch.bool else at


class OutputLayer(nn.Module):
    """Final norm, modulation and the zero-initialised projection to the vocabulary."""

    def __init__(self, config: DITConfig):
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.is_compiled = False  # see `training.acceleration`
        zeros = [self.linear]
        if config.adaln:
            self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.hidden_size)
            zeros.append(self.adaLN_modulation)
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulation(self, condition: Tensor | None) -> Modulation:
        """Of the norm, from (B or 1, T or 1, C)."""
        if condition is None:
            return IDENTITY
        return Modulation(*self.adaLN_modulation(condition).chunk(2, dim=-1), None)

    def modulation_at(
        self, positions: Tensor, condition: Tensor | None, *, shape: torch.Size
    ) -> Modulation:
        """The same at positions (n,) in the flattened (B, T), which `shape` begins with.

        Each part is (n, D) or, where sigma is one for all, one row for all. A sigma per row makes
        as many products as there are rows, not as there are positions.
        """
        if condition is None or condition.shape[:2] == (1, 1):
            return self.modulation(condition)
        if condition.shape[1] > 1:
            condition = condition.expand(*shape[:2], -1).flatten(0, 1)
            return self.modulation(condition.index_select(0, positions))
        of_rows = self.adaLN_modulation(condition[:, 0]).index_select(0, positions // shape[1])
        return Modulation(*of_rows.chunk(2, dim=-1), None)

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None,
        logits_at: Tensor | None = None,
        target: Target | None = None,
    ) -> Tensor | TargetScores | tuple[Tensor, ...]:
        """(B, T, D) -> (B, T, V), or (n_selected, V) with `logits_at`, see `DIT.forward`.

        With a target, the scores of its tokens at these positions instead, or what it reads.
        """
        if logits_at is None:
            modulation = self.modulation(condition)
        else:
            at = flat_positions(logits_at)
            modulation = self.modulation_at(at, condition, shape=x.shape)
            x = x.flatten(0, 1).index_select(0, at)
        x = self.norm_final(x, modulation)
        if target is None:
            return self.linear(x)
        x, asked = x.flatten(0, -2), (target.tokens.flatten(), target.excluded)
        if target.read is not None:
            parts = zip(x.split(_READ_AT_ONCE), asked[0].split(_READ_AT_ONCE), strict=True)
            found = [target.read(self.linear(some), tokens) for some, tokens in parts]
            return tuple(torch.cat(column) for column in zip(*found, strict=True))
        if not is_plain(self.linear, nn.Linear) or self.linear.bias is None:
            return called_target_scores(x, self.linear, targets=asked[0], excluded=asked[1])
        x = x.to(matmul_dtype(self.linear.weight))
        return target_scores(
            x, self.linear.weight, self.linear.bias,
            targets=asked[0], excluded=asked[1], is_compiled=self.is_compiled,
        )  # fmt: skip


class DIT(nn.Module):
    """Token ids (and the noise level sigma) -> logits over the vocabulary."""

    def __init__(self, config: DITConfig):
        super().__init__()
        self.config = config
        self.vocab_embed = EmbeddingLayer(config.vocab_size, config.hidden_size)
        if config.adaln:
            self.sigma_map = SigmaEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config.head_dim)
        self.blocks = nn.ModuleList(DITBlock(config) for _ in range(config.n_blocks))
        self.output_layer = OutputLayer(config)

    def forward(
        self,
        indices: Tensor,
        sigma: Tensor | None = None,
        *,
        pattern: AttentionPattern,
        kv_cache: KVCache | CleanHalf | None = None,
        positions: Tensor | None = None,
        logits_at: Tensor | None = None,
        target: Target | None = None,
    ) -> Tensor | TargetScores | tuple[Tensor, ...]:
        """Predict the clean token at each position.

        Args:
            indices: token ids (B, T), int64; for `BLOCK_DIFFUSION` [x_t ; x_0], T = 2N.
            sigma: noise level of each row (B,) or of each (noisy) position (B, T) or (B, N);
                None means 0 everywhere, a conditioning computed once for the whole batch.
                The clean half of `BLOCK_DIFFUSION` is conditioned on 0 where sigma is per position.
            pattern: who sees whom.
            kv_cache: tokens before `indices`; this pass's keys are written behind them. With
                `BLOCK_DIFFUSION` the clean half, and `indices` are x_t alone, T = N.
            positions: rotary positions (T,) or (B, T); by default they count on from the cache,
                and both halves of `BLOCK_DIFFUSION` count from 0.
            logits_at: compute logits only there: boolean (B, N), or positions (n_selected,) int64
                in the flattened (B, N), which nobody has to count.
            target: return the scores of these tokens instead, or what it reads of the logits,
                without holding all of them.

        Returns:
            Logits (B, T, V), for `BLOCK_DIFFUSION` (B, N, V); with `logits_at` (n_selected, V).
            With `target` its scores or what it reads, as many.
        """
        is_pair = pattern is AttentionPattern.BLOCK_DIFFUSION and kv_cache is None
        num_outputs = indices.shape[1] // 2 if is_pair else indices.shape[1]
        if positions is None:
            start = 0 if kv_cache is None else kv_cache.num_tokens
            positions = torch.arange(start, start + indices.shape[1], device=indices.device)
            positions = (positions - start) % num_outputs + start
        cos, sin = self.rotary_emb(positions)
        condition = self.condition(sigma, indices=indices)

        x, last = self.vocab_embed(indices), len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x = block(
                x, condition=condition, cos=cos, sin=sin,
                pattern=pattern, layer=layer, kv_cache=kv_cache,
                # After the last layer the clean half has done its work: it was seen.
                num_outputs=num_outputs if is_pair and layer == last else None,
            )  # fmt: skip
        if condition is not None and condition.shape[1] > 1:
            condition = condition[:, :num_outputs]
        return self.output_layer(x, condition=condition, logits_at=logits_at, target=target)

    def make_cache(
        self,
        batch_size: int,
        *,
        capacity: int,
        dtype: torch.dtype | None = None,
        kind: Callable[..., KVCache] = KVCache,
    ) -> KVCache:
        """An empty cache for this network, by default of the precision its keys have right now."""
        device = next(self.parameters()).device
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return kind(
            n_layers=len(self.blocks),
            batch_size=batch_size,
            n_heads=self.config.n_heads,
            capacity=capacity,
            head_dim=self.config.head_dim,
            device=device,
            dtype=dtype or weights_dtype(self),
        )

    def condition(self, sigma: Tensor | None, *, indices: Tensor) -> Tensor | None:
        """The conditioning vectors (B or 1, T or 1, C); None for a network without adaLN."""
        if not self.config.adaln:
            return None
        if sigma is None:
            sigma = torch.zeros(1, device=indices.device)
        if sigma.ndim == 1:
            sigma = sigma[:, None]
        elif sigma.shape[1] < indices.shape[1]:
            sigma = torch.cat((sigma, torch.zeros_like(sigma)), dim=1)
        return F.silu(self.sigma_map(sigma))
