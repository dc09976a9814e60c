"""Passes of fixed shapes over a KV cache: compiled, and on a GPU replayed as CUDA graphs.

A pass of one block has so little arithmetic that a GPU waits for its kernels to be launched. When
neither shapes nor addresses change, the whole pass is one launch. So queries see all slots of the
cache, under a mask, and every input is copied to where the recorded pass reads it.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .dit import split_heads
from .inference import InferenceDIT
from .kv_cache import KVCache, StaticKVCache
from .masks import AttentionPattern


@dataclass
class RecordedPass:
    """The inputs of a pass at addresses that stay, and the pass as a CUDA graph once recorded.

    Attributes:
        inputs: tensors that `StaticInferenceDIT.forward` takes before the cache's buffers.
        buffers: of the cache, see `StaticKVCache.buffers`.
        graph, logits: the recorded pass and its output.
    """

    inputs: list[Tensor]
    buffers: Tensor
    graph: torch.cuda.CUDAGraph | None = field(default=None, init=False)
    logits: Tensor | None = field(default=None, init=False)


class StaticInferenceDIT:
    """Called as `InferenceDIT` is. What passes over a cache compute is compiled per shape.

    The first pass of a shape runs as it is written: a prompt's length comes once.

    Args:
        network: does all passes without a cache.
    """

    def __init__(self, network: InferenceDIT):
        self.inner, self.config, self.dtype = network, network.config, network.dtype
        self._compiled = torch.compile(self.forward, dynamic=False, fullgraph=True)
        # Recorded passes belong to the cache whose buffers they read.
        self._cache: StaticKVCache | None = None
        self._passes: dict[tuple[int, ...], RecordedPass | None] = {}

    @torch.no_grad()
    def __call__(
        self,
        indices: Tensor,
        sigma: None = None,
        *,
        pattern: AttentionPattern,
        kv_cache: StaticKVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """See `InferenceDIT.__call__`."""
        if kv_cache is None:
            return self.inner(indices, sigma, pattern=pattern, logits_at=logits_at)
        inputs, num_logits = self._inputs(indices, logits_at, pattern=pattern, kv_cache=kv_cache)
        if kv_cache is not self._cache:
            self._cache, self._passes = kv_cache, {}
        shape = (*indices.shape, len(inputs[1]))
        with torch.autocast(indices.device.type, enabled=False):
            if shape not in self._passes:
                self._passes[shape] = None
                logits = self.forward(*inputs, kv_cache.buffers)
            else:
                logits = self._run(shape, inputs, buffers=kv_cache.buffers)
        logits = logits[:num_logits]
        return logits.unflatten(0, indices.shape) if logits_at is None else logits

    def _inputs(
        self,
        indices: Tensor,
        logits_at: Tensor | None,
        *,
        pattern: AttentionPattern,
        kv_cache: StaticKVCache,
    ) -> tuple[list[Tensor], int]:
        """The inputs of `forward`, and how many of its logits were asked for."""
        num_rows, num_new = indices.shape
        start = kv_cache.num_tokens
        positions = torch.arange(start, start + num_new, device=indices.device)
        cos, sin = self.inner.network.rotary_emb(positions)
        block_size = self.config.block_size
        slots, mask = kv_cache.place(num_new, pattern=pattern, block_size=block_size)
        if logits_at is None:
            logits_at = torch.ones_like(indices, dtype=torch.bool)
        at = logits_at.flatten().nonzero()[:, 0]
        # Rows that have stopped ask for nothing: whole numbers of rows keep the shapes few.
        spare = -len(at) % num_rows if len(at) else num_rows
        return [indices, F.pad(at, (0, spare)), cos, sin, slots, mask], len(at)

    def _run(self, shape: tuple[int, ...], inputs: list[Tensor], *, buffers: Tensor) -> Tensor:
        recorded = self._passes[shape]
        if recorded is None:
            recorded = self._passes[shape] = RecordedPass([x.clone() for x in inputs], buffers)
        for place, value in zip(recorded.inputs, inputs, strict=True):
            place.copy_(value)
        if buffers.device.type != "cuda":
            return self._compiled(*recorded.inputs, buffers)
        if recorded.graph is None:
            self._record(recorded)
        recorded.graph.replay()
        return recorded.logits

    def _record(self, recorded: RecordedPass) -> None:
        """Compile the pass and record its kernels. Running it twice writes the same keys twice."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they need
            for _ in range(2):
                self._compiled(*recorded.inputs, recorded.buffers)
        torch.cuda.current_stream().wait_stream(stream)
        recorded.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded.graph):
            recorded.logits = self._compiled(*recorded.inputs, recorded.buffers)

    def forward(
        self,
        indices: Tensor,
        at: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        mask: Tensor,
        buffers: Tensor,
    ) -> Tensor:
        """One pass over the cache.

        Args:
            indices: tokens (B, T).
            at: positions of the logits among the B T tokens, (n,).
            cos, sin: of the tokens' rotation, see `Rotary`.
            slots, mask: see `StaticKVCache.place`.
            buffers: see `StaticKVCache.buffers`; the tokens' keys and values are written into it.

        Returns:
            Logits (n, V).
        """
        net = self.inner
        x = net.network.vocab_embed(indices).float()
        for layer, block in enumerate(net.blocks):
            q, k, v = split_heads(block.qkv(x), n_heads=self.config.n_heads, cos=cos, sin=sin)
            keys, values = buffers[layer]
            keys.index_copy_(2, slots, k)
            values.index_copy_(2, slots, v)
            heads = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            heads = heads.transpose(1, 2).flatten(2)  # (B, T, D)
            if layer == len(net.blocks) - 1:
                x, heads = x.flatten(0, 1)[at], heads.flatten(0, 1)[at]  # (n, D)
            x = block.add(x, heads)
        return net.head(net.norm_final(x, dtype=self.dtype))

    def make_cache(self, batch_size: int, *, capacity: int) -> KVCache:
        """An empty cache of fixed shapes for this network."""
        return self.inner.network.make_cache(
            batch_size, capacity=capacity, dtype=self.dtype, kind=StaticKVCache
        )
