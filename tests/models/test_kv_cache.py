"""The KV cache: piece by piece equals all at once, and only what is committed stays."""

import pytest
import torch

from models.dit import DIT
from models.masks import AttentionPattern
from tests.helpers.references import cache_for, random_tokens, small_dit

BLOCK_CAUSAL, CAUSAL = AttentionPattern.BLOCK_CAUSAL, AttentionPattern.CAUSAL


def by_pieces(
    network: DIT, tokens: torch.Tensor, *, pattern: AttentionPattern, pieces: list[int]
) -> torch.Tensor:
    """Logits of all tokens, computed piece after piece over one cache."""
    cache = cache_for(network, batch_size=tokens.shape[0], capacity=tokens.shape[1])
    logits = []
    for piece in tokens.split(pieces, dim=1):
        logits.append(network(piece, pattern=pattern, kv_cache=cache))
        cache.commit(piece.shape[1])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("pattern", "block_size", "pieces"),
    [
        (CAUSAL, 16, [1] * 16),
        (CAUSAL, 16, [5, 1, 1, 3, 6]),  # a prompt, tokens, several at once
        (BLOCK_CAUSAL, 1, [1] * 16),
        (BLOCK_CAUSAL, 4, [4] * 4),
        (BLOCK_CAUSAL, 4, [8, 4, 4]),  # a prompt of two blocks
        (BLOCK_CAUSAL, 4, [4, 12]),  # several blocks at once behind the cache need a mask
        (BLOCK_CAUSAL, 16, [16]),
        (BLOCK_CAUSAL, 16, [16] * 64),  # the whole context window
        (CAUSAL, 16, [1000, *[1] * 24]),
    ],
)
@torch.no_grad()
def test_cached_equals_uncached(pattern, block_size, pieces):
    """The original's cache crashed with its own network, and for AR attended to zero rows."""
    network = small_dit(block_size=block_size, adaln=pattern is BLOCK_CAUSAL)
    tokens = random_tokens(3, sum(pieces))
    expected = network(tokens, pattern=pattern)
    found = by_pieces(network, tokens, pattern=pattern, pieces=pieces)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "backend", ["auto", "flash_attn", pytest.param("flex", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("pattern", [BLOCK_CAUSAL, CAUSAL])
@torch.no_grad()
def test_every_backend(pattern, backend):
    """A prompt of two blocks, then a block at a time."""
    torch._dynamo.reset()  # the compiler gives up on a function after eight shapes
    tokens = random_tokens(2, 16)
    expected = small_dit()(tokens, pattern=pattern)
    network = small_dit(attn_backend=backend)
    found = by_pieces(network, tokens, pattern=pattern, pieces=[8, 4, 4])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_is_not_committed_leaves_no_trace():
    """A block is denoised many times over the same cache before its keys are stored."""
    network, tokens = small_dit(), random_tokens(2, 8)
    cache = cache_for(network, batch_size=2, capacity=8)
    network(tokens[:, :4], pattern=BLOCK_CAUSAL, kv_cache=cache)
    cache.commit(4)
    for seed in (1, 2):
        noise = random_tokens(2, 4, seed=seed)
        network(noise, pattern=BLOCK_CAUSAL, kv_cache=cache)
    assert cache.num_tokens == 4
    found = network(tokens[:, 4:], pattern=BLOCK_CAUSAL, kv_cache=cache)
    expected = network(tokens, pattern=BLOCK_CAUSAL)[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_free_capacity_is_not_attended_to():
    """The AR cache of the original let queries see its rows of zeros."""
    network, tokens = small_dit(), random_tokens(1, 8)
    found = []
    for capacity in (8, 64):
        cache = cache_for(network, batch_size=1, capacity=capacity)
        network(tokens[:, :4], pattern=CAUSAL, kv_cache=cache)
        cache.commit(4)
        found.append(network(tokens[:, 4:], pattern=CAUSAL, kv_cache=cache))
    assert torch.equal(*found)


@torch.no_grad()
def test_part_of_a_pass_can_be_committed():
    network, tokens = small_dit(), random_tokens(1, 12)
    cache = cache_for(network, batch_size=1, capacity=12)
    network(tokens[:, :8], pattern=BLOCK_CAUSAL, kv_cache=cache)
    cache.commit(4)
    found = network(tokens[:, 4:8], pattern=BLOCK_CAUSAL, kv_cache=cache)
    expected = network(tokens[:, :8], pattern=BLOCK_CAUSAL)[:, 4:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_piece_that_would_wrap_is_an_error():
    network = small_dit()
    cache = cache_for(network, batch_size=1, capacity=6)
    network(random_tokens(1, 4), pattern=BLOCK_CAUSAL, kv_cache=cache)
    cache.commit(4)
    with pytest.raises(ValueError, match="4 more tokens behind 4 do not fit in one piece"):
        network(random_tokens(1, 4), pattern=BLOCK_CAUSAL, kv_cache=cache)


def test_append_returns_views_of_one_buffer():
    """Steps of a block copy nothing; the cost of a step does not grow by a copy of the cache."""
    cache = cache_for(small_dit(), batch_size=1, capacity=64)
    k = torch.ones(1, 2, 4, 16)
    first, _ = cache.append(0, k=k, v=k)
    cache.commit(4)
    second, _ = cache.append(0, k=4 * k, v=4 * k)
    keys, values = cache.append(0, k=2 * k, v=3 * k)
    assert keys.shape == values.shape == (1, 2, 8, 16)
    assert keys.data_ptr() == second.data_ptr()
    assert keys.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    assert (keys[:, :, :4] == 1).all() and (keys[:, :, 4:] == 2).all()
    assert (values[:, :, 4:] == 3).all()


def test_layers_that_move_keep_what_they_hold():
    """Keys and values of each layer, while all of them grow and change places."""
    cache = cache_for(small_dit(), batch_size=2, capacity=16)
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2, 2, 2, 2, 16, 16, generator=generator)  # layer, k or v, B, H, N, d
    for start, size in ((0, 4), (4, 8), (12, 1), (13, 1), (14, 2)):
        for layer in range(2):
            k, v = written[layer, :, :, :, start : start + size]
            found = torch.stack(cache.append(layer, k=k, v=v))
            assert torch.equal(found, written[layer, :, :, :, : start + size])
        cache.commit(size)
