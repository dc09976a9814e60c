"""Keys and values of the text that is already final."""

import torch
from torch import Tensor


class KVCache:
    """Rotated keys and values per layer, each (B, H, capacity, d), in static buffers.

    A sampler makes one and passes it to the network. A forward pass writes its own T tokens behind
    the committed ones and attends to both; only `commit` makes them stay. So a block may be
    denoised many times over the same cache, and is stored when it is final.

    The buffers are a ring: once they are full, new tokens take the place of the oldest. Their order
    does not matter to attention, and the rotation that keys carry is relative.

    Args:
        n_layers, batch_size, n_heads, capacity, head_dim: the buffers' sizes; capacity in tokens.
        device, dtype: of the buffers; the dtype is that of the network's keys.

    Attributes:
        num_tokens: tokens committed so far, also those that have left the ring.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        batch_size: int,
        n_heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (n_layers, 2, batch_size, n_heads, capacity, head_dim)
        self._buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.num_tokens = 0
        self._num_written = 0

    def append(self, layer: int, *, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tentative keys and values (B, H, T, d) and return all that a query may see.

        Returns:
            Views (B, H, S, d) of the buffers, S = min(num_tokens + T, capacity): nothing is copied.
            Until the ring is full they are in order, the new tokens last.

        Raises:
            ValueError: if the tokens do not fit into one piece of the ring.
        """
        size, end = k.shape[2], self.num_tokens + k.shape[2]
        slot = self.num_tokens % self.capacity
        if slot + size > self.capacity:
            raise ValueError(
                f"KV cache: {size} more tokens behind {self.num_tokens} do not fit in one piece "
                f"into a ring of {self.capacity}; store them in smaller pieces"
            )
        keys, values = self._buffer[layer]
        keys[:, :, slot : slot + size] = k
        values[:, :, slot : slot + size] = v
        self._num_written = end
        seen = min(end, self.capacity)
        return keys[:, :, :seen], values[:, :, :seen]

    def commit(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` of the last forward pass's tokens.

        Raises:
            ValueError: if the last pass did not write that many.
        """
        if self.num_tokens + num_tokens > self._num_written:
            raise ValueError(
                f"KV cache: {num_tokens} tokens to keep, the last pass wrote "
                f"{self._num_written - self.num_tokens}"
            )
        self.num_tokens += num_tokens

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, for (B,) int64; in the same buffers."""
        seen = min(self.num_tokens, self.capacity)
        for buffer in self._buffer[..., :seen, :]:  # a layer at a time
            buffer.copy_(buffer[:, rows])
