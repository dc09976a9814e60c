"""Passes of fixed shapes over a KV cache: compiled, and on a GPU replayed as CUDA graphs.

A pass of one block has so little arithmetic that a GPU waits for its kernels to be launched. When
neither shapes nor addresses change, the whole pass is one launch. So queries see a whole number of
the cache's slots, under a mask, and what differs from pass to pass is copied to where the recorded
one reads it: tokens, positions of the logits and the number of tokens before.

What is compiled are the pieces between the attentions. They know neither cache nor layer, so all
layers and all lengths of a text share them.
"""

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from .compiling import MAX_GRAPHS, allow_graphs
from .dit import flat_positions, split_heads
from .inference import InferenceBlock, InferenceDIT
from .kv_cache import KVCache, StaticKVCache, slots_and_mask
from .masks import AttentionPattern

logger = logging.getLogger(__name__)


def project(
    block: InferenceBlock, x: Tensor, *, n_heads: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, each (B, H, T, d), of the residual (B, T, D)."""
    return split_heads(block.qkv(x), n_heads=n_heads, cos=cos, sin=sin)


def add(block: InferenceBlock, x: Tensor, heads: Tensor) -> Tensor:
    """See `InferenceBlock.add`."""
    return block.add(x, heads)


def head(network: InferenceDIT, x: Tensor) -> Tensor:
    """Logits (n, V) of the residual (n, D)."""
    return network.head(network.norm_final(x, dtype=network.dtype))


PIECES = (project, add, head)


@functools.cache
def compiled_pieces() -> tuple[Callable[..., Tensor], ...]:
    """The pieces of all networks of this process; each compiles once per shape."""
    return tuple(torch.compile(piece, dynamic=False, fullgraph=True) for piece in PIECES)


@dataclass
class StaticPass:
    """A pass of one shape: its inputs at addresses that stay, and on a GPU its CUDA graph.

    Attributes:
        run: computes logits (n, V) of the inputs.
        inputs: tokens (B, T), positions (n,) of the logits among the B T tokens, and the number of
            tokens before, ().
        graph, logits: the recorded pass and its output.
    """

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, Tensor, Tensor]
    graph: torch.cuda.CUDAGraph | None = field(default=None, init=False)
    logits: Tensor | None = field(default=None, init=False)

    def __call__(self, indices: Tensor, at: Tensor, *, start: int) -> Tensor:
        """Logits (n, V); of more than the positions `at`, the rest are anybody's."""
        tokens, places, before = self.inputs
        tokens.copy_(indices)
        places[: len(at)].copy_(at)
        before.fill_(start)
        if indices.device.type != "cuda":
            return self.run(*self.inputs)
        # A process that sees several GPUs would otherwise record on the first of them.
        with torch.cuda.device(indices.device):
            if self.graph is None:
                self._record()
            self.graph.replay()
        return self.logits

    def _record(self) -> None:
        """Run the pass, and record its kernels. Running it twice writes the same keys twice."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries allocate what they need
            for _ in range(2):
                self.run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Without `stream` torch takes one of the device that the process first recorded on.
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self.run(*self.inputs)
        self.graph = graph


class StaticInferenceDIT:
    """Called as `InferenceDIT` is; passes over a cache have shapes that come again and again.

    The first pass of a shape runs as it is written: a prompt's length comes once.

    Args:
        network: does all passes without a cache.
        compiles: compile what lies between the attentions. Beyond `MAX_GRAPHS` new shapes are
            not compiled any more, which the log says once.
    """

    def __init__(self, network: InferenceDIT, *, compiles: bool = True):
        self.inner, self.config, self.dtype = network, network.config, network.dtype
        self._compiles = compiles
        self._compiled_shapes: set[tuple] = set()
        # Passes read and write the tensors of the last cache, so a new one takes over from it.
        self._layers: list[tuple[Tensor, Tensor]] | None = None
        self._last_cache: weakref.ref | None = None
        self._passes: dict[tuple, StaticPass | None] = {}

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
        """See `InferenceDIT.__call__`. The logits are overwritten by the next pass."""
        if kv_cache is None:
            return self.inner(indices, sigma, pattern=pattern, logits_at=logits_at)
        self._adopt(kv_cache)
        if logits_at is None:
            at = torch.arange(indices.numel(), device=indices.device)
        else:
            at = flat_positions(logits_at)
        # Rows that have stopped ask for nothing: whole numbers of rows keep the shapes few.
        num_rows = len(indices)
        num_logits = max(1, -(-len(at) // num_rows)) * num_rows
        num_slots, is_masked = kv_cache.place(
            indices.shape[1], pattern=pattern, block_size=self.config.block_size
        )
        form = (pattern, num_slots, is_masked)
        shape = (*indices.shape, num_logits, *form)
        with torch.autocast(indices.device.type, enabled=False):
            if shape not in self._passes:
                self._passes[shape] = None
                before = torch.full((), kv_cache.num_tokens, device=indices.device)
                places = F.pad(at, (0, num_logits - len(at)))
                logits = self.forward(indices, places, before, form=form)
            else:
                logits = self._pass(shape)(indices, at, start=kv_cache.num_tokens)
        logits = logits[: len(at)]
        return logits.unflatten(0, indices.shape) if logits_at is None else logits

    def _adopt(self, cache: StaticKVCache) -> None:
        if cache.layers is not self._layers:
            self._layers, self._last_cache, self._passes = cache.layers, weakref.ref(cache), {}

    def _pass(self, shape: tuple) -> StaticPass:
        if self._passes[shape] is None:
            num_rows, num_new, num_logits = shape[:3]
            like = {"device": self._layers[0][0].device, "dtype": torch.int64}
            self._passes[shape] = StaticPass(
                run=functools.partial(self._compiled_forward, shape=shape),
                inputs=(
                    torch.zeros(num_rows, num_new, **like),
                    torch.zeros(num_logits, **like),
                    torch.zeros((), **like),
                ),
            )
        return self._passes[shape]

    def _compiled_forward(self, *inputs: Tensor, shape: tuple) -> Tensor:
        """`forward`, compiled where it is to be and still can be."""
        form = shape[3:]
        if shape in self._compiled_shapes:
            return self.forward(*inputs, form=form, pieces=compiled_pieces())
        if self._compiles:
            allow_graphs()
            try:
                logits = self.forward(*inputs, form=form, pieces=compiled_pieces())
                self._compiled_shapes.add(shape)
                return logits
            except FailOnRecompileLimitHit:
                self._compiles = False
                logger.warning(
                    "sampling.compile=true: %d shapes are compiled, and no further ones will be; "
                    "batches of one size, and prompts of one length, need few",
                    MAX_GRAPHS,
                )
        return self.forward(*inputs, form=form)

    def forward(
        self,
        indices: Tensor,
        at: Tensor,
        before: Tensor,
        *,
        form: tuple[AttentionPattern, int, bool],
        pieces: tuple[Callable[..., Tensor], ...] = PIECES,
    ) -> Tensor:
        """One pass over the cache, into which the tokens' keys and values are written.

        Args:
            indices: tokens (B, T).
            at: positions of the logits among the B T tokens, (n,).
            before: number of committed tokens, ().
            form: the pattern, and what `StaticKVCache.place` says.
            pieces: `PIECES` or their compiled form.

        Returns:
            Logits (n, V).
        """
        net, (pattern, num_slots, is_masked), (project, add, head) = self.inner, form, pieces
        positions = before + torch.arange(indices.shape[1], device=indices.device)
        cos, sin = net.network.rotary_emb(positions)
        slots, mask = slots_and_mask(
            positions,
            capacity=self._layers[0][0].shape[2],
            num_slots=num_slots,
            pattern=pattern,
            block_size=self.config.block_size,
        )
        bias = None
        if is_masked:  # what attention makes of a boolean mask, made once for all layers
            bias = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -torch.inf)
        x, last = net.network.vocab_embed(indices).float(), len(net.blocks) - 1
        for layer, (block, (keys, values)) in enumerate(zip(net.blocks, self._layers, strict=True)):
            q, k, v = project(block, x, n_heads=self.config.n_heads, cos=cos, sin=sin)
            keys.index_copy_(2, slots, k)
            values.index_copy_(2, slots, v)
            seen = keys[:, :, :num_slots], values[:, :, :num_slots]
            heads = F.scaled_dot_product_attention(q, *seen, attn_mask=bias)
            heads = heads.transpose(1, 2).flatten(2)  # (B, T, D)
            if layer == last:
                x, heads = x.flatten(0, 1)[at], heads.flatten(0, 1)[at]  # (n, D)
            x = add(block, x, heads)
        return head(net, x)

    def make_cache(self, batch_size: int, *, capacity: int) -> KVCache:
        """An empty cache of fixed shapes for this network.

        It takes over the tensors of the last one, and so the recorded passes, where that is gone
        and was of the same size. So a run keeps its records from batch to batch.
        """
        is_gone = self._last_cache is not None and self._last_cache() is None
        sizes = (batch_size, self.config.n_heads, capacity, self.config.head_dim)
        layers = None
        if is_gone and self._layers[0][0].shape == sizes:
            layers = self._layers
        elif is_gone:
            self._layers, self._last_cache, self._passes = None, None, {}  # memory for the new one
        cache = self.inner.network.make_cache(
            batch_size,
            capacity=capacity,
            dtype=self.dtype,
            kind=functools.partial(StaticKVCache, layers=layers),
        )
        if layers is not None:
            self._last_cache = weakref.ref(cache)
        return cache
