"""Keys and values of the text that is already final."""

from typing import Any

import torch
from torch import Tensor

from .masks import AttentionPattern, may_attend

# A CPU's matrix products want each head's keys back to back, see `KVCache`. Passes of fewer tokens
# than this would move them too often, and leave room for as many as that.
_FEW_TOKENS, _ROOM = 4, 64


class KVCache:
    """Rotated keys and values per layer, in static buffers of B H capacity d numbers.

    A sampler makes one and passes it to the network. A forward pass writes its own T tokens behind
    the committed ones and attends to both; only `commit` makes them stay. So a block may be
    denoised many times over the same cache, and is stored when it is final.

    The buffers are a ring: once they are full, new tokens take the place of the oldest. Their order
    does not matter to attention, and the rotation that keys carry is relative.

    With `moves` the tokens of all heads lie without gaps, as many as there are: a CPU's library of
    matrix products, oneDNN, copies whatever has gaps, in every product. So they move when the text
    has grown by a block, not in each step: a layer into a spare buffer, and what it leaves is the
    spare one of the next. Without, a head's tokens stay where they are.

    Args:
        n_layers, batch_size, n_heads, capacity, head_dim: the buffers' sizes; capacity in tokens.
        device, dtype: of the buffers; the dtype is that of the network's keys.
        moves: see above; None: on a CPU.

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
        moves: bool | None = None,
    ):
        size = batch_size * n_heads * capacity * head_dim
        moves = device.type == "cpu" if moves is None else moves
        # Nothing reads what has not been written, so a short text touches little of it.
        self._buffer = torch.empty(n_layers + moves, 2, size, device=device, dtype=dtype)
        self._place, self._spare = list(range(n_layers)), n_layers  # where in it a layer is
        self._shape = (2, batch_size, n_heads, -1, head_dim)
        self._tokens_size = size // capacity
        # How many tokens of each head lie together, per layer.
        self._room = [0 if moves else capacity] * n_layers
        self.capacity = capacity
        self.num_tokens = 0
        self._num_written = 0

    def append(self, layer: int, *, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tentative keys and values (B, H, T, d) and return all that a query may see.

        Returns:
            Views (B, H, S, d) of the buffers, S = min(num_tokens + T, capacity). Until the ring is
            full they are in order, the new tokens last.

        Raises:
            ValueError: if the tokens do not fit into one piece of the ring.
        """
        keys, values, new = self.reserve(layer, num_new=k.shape[2])
        keys[:, :, new] = k
        values[:, :, new] = v
        return keys, values

    def reserve(self, layer: int, *, num_new: int) -> tuple[Tensor, Tensor, slice]:
        """What `append` returns, with the T = `num_new` tokens still to be written, and where.

        Raises:
            ValueError: as `append`.
        """
        slot, end = self._first_slot(num_new), self.num_tokens + num_new
        seen = min(end, self.capacity)
        if seen > self._room[layer]:
            step = num_new if num_new >= _FEW_TOKENS else _ROOM
            self._make_room(layer, min(self.capacity, max(seen, slot + step)))
        keys, values = self._tokens(layer)
        self._num_written = end
        return keys[:, :, :seen], values[:, :, :seen], slice(slot, slot + num_new)

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
        for layer in range(len(self._room)):
            tokens = self._tokens(layer)
            tokens.copy_(tokens[:, rows])

    def _first_slot(self, num_new: int) -> int:
        """Where in the ring the next tokens go."""
        slot = self.num_tokens % self.capacity
        if slot + num_new > self.capacity:
            raise ValueError(
                f"KV cache: {num_new} more tokens behind {self.num_tokens} do not fit in one piece "
                f"into a ring of {self.capacity}; store them in smaller pieces"
            )
        return slot

    def _tokens(self, layer: int) -> Tensor:
        """Keys and values of a layer, (2, B, H, room, d), a view of its buffer."""
        size = self._room[layer] * self._tokens_size
        return self._buffer[self._place[layer], :, :size].view(self._shape)

    def _make_room(self, layer: int, room: int) -> None:
        """Let `room` tokens of each head lie together, and keep the committed ones."""
        committed = self._tokens(layer)[:, :, :, : self.num_tokens]
        self._place[layer], self._spare = self._spare, self._place[layer]
        self._room[layer] = room
        self._tokens(layer)[:, :, :, : self.num_tokens] = committed


class CleanHalf:
    """Keys and values of the clean half of [x_t ; x_0], which do not depend on x_t.

    One pass over x_0 (`BLOCK_CAUSAL`) fills it. After `commit`, passes over several x_t of the same
    x_0 see them as the pass over both halves would.
    """

    num_tokens = 0  # before either half

    def __init__(self):
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._is_complete = False

    def append(self, layer: int, *, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep x_0's keys and values (B, H, N, d); or put them behind those of x_t.

        x_t may have R B rows, R times the rows of x_0 one after the other: (R B, H, 2N, d).
        """
        if not self._is_complete:
            self._layers.append((k, v))
            return k, v
        copies = len(k) // len(self._layers[layer][0])
        clean_k, clean_v = (x.repeat(copies, 1, 1, 1) for x in self._layers[layer])
        return torch.cat((k, clean_k), dim=2), torch.cat((v, clean_v), dim=2)

    def commit(self) -> None:
        """From now on passes are over x_t."""
        self._is_complete = True


class StaticKVCache(KVCache):
    """A KV cache for passes whose shapes never change: queries see all slots, under a mask.

    Args:
        as those of `KVCache`.
    """

    def __init__(self, **sizes: Any):
        super().__init__(**sizes, moves=False)
        self._buffer.zero_()  # all of it takes part, and what a mask hides must be a number

    @property
    def buffers(self) -> Tensor:
        """Keys and values of all layers, (layers, 2, B, H, capacity, d)."""
        return self._buffer.view(len(self._room), *self._shape)

    def place(
        self, num_new: int, *, pattern: AttentionPattern, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Where the next pass's T = `num_new` tokens go, and which slots they see.

        Returns:
            Slots (T,) int64 and a boolean mask (T, capacity).

        Raises:
            ValueError: if the tokens do not fit into one piece of the ring.
        """
        slot = self._first_slot(num_new)
        device = self._buffer.device
        new = torch.arange(num_new, device=device)
        own = may_attend(
            new[:, None] + self.num_tokens,
            new + self.num_tokens,
            pattern=pattern,
            length=self.capacity,
            block_size=block_size,
        )
        is_committed = torch.arange(self.capacity, device=device) < self.num_tokens
        mask = is_committed.repeat(num_new, 1)
        mask[:, slot : slot + num_new] = own
        self._num_written = self.num_tokens + num_new
        return slot + new, mask
