"""What the samplers share that write from left to right, block after block.

`particles.py` weighs their texts by the same steps: where a block ends, in which pass each of its
masks is revealed, and what the network predicts there.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from models.denoiser import Denoiser
from models.kv_cache import KVCache
from models.masks import AttentionPattern

from .base import Positions, Progress
from .decoding import Decoding
from .stopping import StopRule

CONTEXT_WINDOW = 1024  # tokens that the network sees at most


@dataclass(frozen=True, kw_only=True)
class BlockwiseSampler(abc.ABC):
    """Fills one block after another; finished ones may be kept as keys and values.

    Args:
        mask_index: id of the mask token, which marks what is to be drawn.
        pad_index: what stands behind the end of a row that stopped.
        pattern: who sees whom.
        decoding: how tokens are drawn.
        stop: when a row ends.
        use_cache: keep keys and values of the text so far.
    """

    mask_index: int
    pad_index: int
    pattern: AttentionPattern
    decoding: Decoding = field(default_factory=Decoding)
    stop: StopRule = field(default_factory=StopRule)
    use_cache: bool = False

    def begin(
        self,
        denoise: Denoiser,
        canvas: Tensor,
        *,
        limits: Tensor | None,
        on_step: Callable[[Tensor], None] | None,
    ) -> tuple[Progress, KVCache | None]:
        """The state of a canvas (B, N) and an empty cache; arguments as in `Sampler.sample`."""
        progress = Progress(canvas, mask_index=self.mask_index, limits=limits, on_step=on_step)
        return progress, self.make_cache(denoise, len(canvas), length=canvas.shape[1])

    def make_cache(self, denoise: Denoiser, batch_size: int, *, length: int) -> KVCache | None:
        """An empty cache for texts of `length` tokens; None where none is used."""
        if not self.use_cache:
            return None
        return denoise.make_cache(batch_size, capacity=self.cache_capacity(length))

    def store(
        self, denoise: Denoiser, progress: Progress, cache: KVCache, *, num_tokens: int
    ) -> None:
        """Store the next tokens, all of them final, in a pass that predicts nothing."""
        tokens = progress.x[:, cache.num_tokens : cache.num_tokens + num_tokens]
        none = tokens.new_empty(0)
        denoise(tokens, pattern=self.pattern, kv_cache=cache, at=(none, none))
        cache.commit(num_tokens)
        progress.count_storing_pass()

    @abc.abstractmethod
    def cache_capacity(self, length: int) -> int:
        """Tokens that the cache holds for texts of `length`."""

    @abc.abstractmethod
    def end_of_block(self, start: int, *, length: int) -> int:
        """Where the block that begins at `start` ends."""

    @abc.abstractmethod
    def pass_numbers(self, masked: Tensor, *, u: Tensor) -> Tensor:
        """In which pass of its block each mask is revealed, (B, L), for uniform u (B, L)."""

    @abc.abstractmethod
    def predict(
        self,
        denoise: Denoiser,
        progress: Progress,
        cache: KVCache | None,
        *,
        start: int,
        end: int,
        at: Positions,
    ) -> Tensor:
        """log p at these positions of the block, whose first column is `start`, (n, V)."""
