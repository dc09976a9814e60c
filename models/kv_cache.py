"""Keys and values of the text that is already final."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .masks import AttentionPattern, is_unrestricted, may_attend

# A CPU's matrix products want each head's keys back to back, see `KVCache`. Passes of fewer tokens
# than this would move them too often, and leave room for as many as that.
_FEW_TOKENS, _ROOM = 4, 64
# Passes of fixed shapes see a multiple of this many slots.
SLOTS = 128


class KVCache:
    """Rotated keys and values per layer, in static buffers of B H capacity d numbers.

    A sampler makes one and passes it to the network. A forward pass writes its own T tokens behind
    the committed ones and attends to both; only `commit` makes them stay. So a block may be
    denoised many times over the same cache, and is stored when it is final.

    The buffers are a ring: once they are full, new tokens take the place of the oldest. Their order
    does not matter to attention, and the rotation that keys carry is relative.

    On a CPU the tokens of all heads lie without gaps, as many as there are: its library of matrix
    products, oneDNN, copies whatever has gaps, in every product. So they move when the text has
    grown by a block, not in each step: a layer into a spare buffer, and what it leaves is the spare
    one of the next. Elsewhere a head's tokens stay where they are.

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
        size = batch_size * n_heads * capacity * head_dim
        moves = device.type == "cpu"
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
        num_new = k.shape[2]
        slot, end = self._first_slot(num_new), self.num_tokens + num_new
        seen = min(end, self.capacity)
        if seen > self._room[layer]:
            step = num_new if num_new >= _FEW_TOKENS else _ROOM
            self._make_room(layer, min(self.capacity, max(seen, slot + step)))
        keys, values = self._tokens(layer)
        keys[:, :, slot : slot + num_new] = k
        values[:, :, slot : slot + num_new] = v
        self._num_written = end
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
    """A KV cache for passes whose shapes do not change: queries see slots under a mask.

    Each layer's keys and values are tensors of their own, which stay where they are: what is
    written into a view of one large buffer is, to a compiler, a new buffer.

    Args:
        layers: keys and values of each layer, (B, H, capacity, d), that another cache no longer
            needs; None: new ones.
        sizes: those of `KVCache`.
    """

    def __init__(self, *, layers: list[tuple[Tensor, Tensor]] | None = None, **sizes: Any):
        self.capacity, self.num_tokens, self._num_written = sizes["capacity"], 0, 0
        if layers is None:
            shape = tuple(sizes[name] for name in ("batch_size", "n_heads", "capacity", "head_dim"))
            how = {"device": sizes["device"], "dtype": sizes["dtype"]}
            # What a mask hides takes part, and must be a number.
            new = [torch.zeros(shape, **how) for _ in range(2 * sizes["n_layers"])]
            layers = list(zip(new[::2], new[1::2], strict=True))
        self.layers = layers

    def place(
        self, num_new: int, *, pattern: AttentionPattern, block_size: int
    ) -> tuple[int, bool]:
        """Make room for the next pass's T = `num_new` tokens.

        Returns:
            How many slots hold all that the tokens may see, a multiple of `SLOTS` or the capacity,
            and whether they need a mask. `slots_and_mask` says which.

        Raises:
            ValueError: if the tokens do not fit into one piece of the ring.
        """
        self._first_slot(num_new)
        self._num_written = self.num_tokens + num_new
        seen = min(self._num_written, self.capacity)
        num_slots = min(self.capacity, -(-seen // SLOTS) * SLOTS)
        sees_all = is_unrestricted(
            pattern, q_len=num_new, kv_len=self._num_written, block_size=block_size
        )
        return num_slots, not (sees_all and seen == num_slots)

    def select_rows(self, rows: Tensor) -> None:
        """See `KVCache.select_rows`."""
        for tensor in itertools.chain.from_iterable(self.layers):
            tensor.copy_(tensor[rows])


def slots_and_mask(
    positions: Tensor, *, capacity: int, num_slots: int, pattern: AttentionPattern, block_size: int
) -> tuple[Tensor, Tensor]:
    """Where a pass over a ring writes its tokens, and what they see there.

    Args:
        positions: of the T tokens in the text, (T,), one after another.
        capacity: of the ring.
        num_slots: S, from `StaticKVCache.place`.
        pattern, block_size: who sees whom.

    Returns:
        Slots (T,) and a boolean mask (T, S).
    """
    slots = positions % capacity
    slot = torch.arange(num_slots, device=positions.device)
    # The new token that a slot takes, if one; all others hold committed tokens or nothing.
    token = slot - slots[0]
    is_new = (token >= 0) & (token < len(positions))
    own = may_attend(
        positions[:, None],
        positions[0] + token,
        pattern=pattern,
        length=capacity,
        block_size=block_size,
    )
    return slots, torch.where(is_new, own, slot < positions[0])
