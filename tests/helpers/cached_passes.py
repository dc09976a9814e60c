"""Passes over a KV cache, of any network that takes one."""

import torch

from tests.helpers.references import random_tokens


def passes(network, *, pattern, dtype=torch.float32):
    """Logits of three cached passes of 4 tokens, the first of them over two blocks."""
    tokens = random_tokens(2, 16)
    at = torch.zeros(2, 4, dtype=torch.bool)
    at[0, 1] = at[0, 3] = at[1, 0] = True
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        cache = network.make_cache(2, capacity=16)
        logits = [network(tokens[:, :8], pattern=pattern, kv_cache=cache).flatten(0, 1)]
        cache.commit(8)
        logits.append(network(tokens[:, 8:12], pattern=pattern, kv_cache=cache, logits_at=at))
        cache.commit(4)
        logits.append(network(tokens[:, 12:], pattern=pattern, kv_cache=cache, logits_at=at))
    return torch.cat(logits).float()


def ring(network, *, pattern, capacity=16):
    """Logits of passes, some shapes several times; 16 tokens of cache are fewer than the text."""
    tokens = random_tokens(2, 28)
    at = torch.zeros(2, 8, dtype=torch.bool)
    at[0, 5] = at[1, 7] = True
    cache, logits = network.make_cache(2, capacity=capacity), []
    for start, size, kept in ((0, 8, 4), (4, 8, 4), (8, 8, 4), *((s, 4, 4) for s in (12, 16, 20))):
        piece, here = tokens[:, start : start + size], at[:, -size:].clone()
        here[1, -1] = start != 16  # there one row has stopped
        logits.append(network(piece, pattern=pattern, kv_cache=cache, logits_at=here))
        cache.commit(kept)
    logits.append(network(tokens[:, 24:], pattern=pattern, kv_cache=cache).flatten(0, 1))
    nowhere = torch.zeros(2, 4, dtype=torch.bool)
    nothing = network(tokens[:, 24:], pattern=pattern, kv_cache=cache, logits_at=nowhere)
    assert nothing.shape == (0, 23)
    return torch.cat(logits)
