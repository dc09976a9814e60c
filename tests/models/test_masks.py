"""The attention patterns against brute force, and what must never be built."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

import models.attention
from models.attention import attend
from models.kernels.sliced_attention import slices_of
from models.masks import AttentionPattern, dense_mask, flex_block_mask, is_unrestricted
from tests.helpers.references import (
    brute_force_mask,
    cache_for,
    random_qkv,
    random_tokens,
    small_dit,
)

CPU = torch.device("cpu")
# (N, L): single tokens, one block, and lengths that are no multiple of FlexAttention's 128.
SIZES = [(1, 1), (2, 1), (2, 2), (6, 2), (6, 3), (12, 1), (12, 4), (12, 12), (90, 1), (90, 90)]
SIZES += [(70, 7), (72, 8), (130, 10)]
# (q_len, kv_len, L): one block, one token or several blocks behind a cache.
CACHED = [(1, 9, 1), (1, 12, 4), (4, 12, 4), (8, 24, 4), (3, 11, 4), (6, 140, 6), (12, 140, 5)]


def cases() -> list[tuple[AttentionPattern, int, int, int]]:
    """(pattern, q_len, kv_len, L) over the whole grid."""
    found = []
    for pattern in AttentionPattern:
        copies = 2 if pattern is AttentionPattern.BLOCK_DIFFUSION else 1
        found += [(pattern, copies * n, copies * n, size) for n, size in SIZES]
    for pattern in (AttentionPattern.FULL, AttentionPattern.CAUSAL, AttentionPattern.BLOCK_CAUSAL):
        found += [(pattern, *case) for case in CACHED]
    return found


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "block_size"), cases())
def test_dense_mask_equals_brute_force(pattern, q_len, kv_len, block_size):
    found = dense_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size, device=CPU)
    expected = brute_force_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size)
    assert torch.equal(found, expected)


def assert_block_mask_equals(found: BlockMask, expected: torch.Tensor) -> None:
    """Entry by entry, and tile by tile: a skipped tile is empty and a full one is full."""
    q_len, kv_len = expected.shape
    entries = create_mask(found.mask_mod, 1, 1, q_len, kv_len, device="cpu")[0, 0]
    assert torch.equal(entries, expected)
    tile_rows, tile_columns = found.BLOCK_SIZE
    for row, part in enumerate(expected.split(tile_rows)):
        num_partial, num_full = found.kv_num_blocks[0, 0, row], found.full_kv_num_blocks[0, 0, row]
        partial = set(found.kv_indices[0, 0, row, :num_partial].tolist())
        full = set(found.full_kv_indices[0, 0, row, :num_full].tolist())
        for column, tile in enumerate(part.split(tile_columns, dim=1)):
            if column in full:
                assert tile.all()
            elif column not in partial:
                assert not tile.any()


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "block_size"), cases())
def test_flex_mask_equals_brute_force(pattern, q_len, kv_len, block_size):
    found = flex_block_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size, device=CPU)
    expected = brute_force_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size)
    assert_block_mask_equals(found, expected)


@pytest.mark.parametrize(("pattern", "q_len", "kv_len", "block_size"), cases())
def test_unrestricted_exactly_where_brute_force_forbids_nothing(pattern, q_len, kv_len, block_size):
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_size": block_size}
    assert is_unrestricted(pattern, **sizes) == bool(brute_force_mask(pattern, **sizes).all())


def test_block_diffusion_mask_skips_most_tiles():
    """FlexAttention pays because of the tiles it skips: about half for [x_t ; x_0]."""
    mask = flex_block_mask(
        AttentionPattern.BLOCK_DIFFUSION, q_len=2048, kv_len=2048, block_size=4, device=CPU
    )
    assert mask.sparsity() > 60  # per cent


def refuse(*_args, **_kwargs):
    raise AssertionError("a mask was built")


def test_no_mask_for_a_block_behind_a_large_cache(monkeypatch):
    """The original built the training mask of (2N)^2 entries at N = 131k, 64 GiB, unused."""
    monkeypatch.setattr(models.attention, "dense_mask", refuse)
    q, k, v = random_qkv(q_len=4, kv_len=131_072, heads=1, dim=4)
    out = attend(q, k, v, pattern=AttentionPattern.BLOCK_CAUSAL, block_size=4, backend="sdpa")
    assert torch.allclose(out, (q @ k.mT / 2).softmax(dim=-1) @ v, atol=1e-6)


def test_no_flex_mask_for_a_block_behind_a_large_cache(monkeypatch):
    """Nor is FlexAttention compiled anew for each length of a growing cache: SDPA takes over."""
    monkeypatch.setattr(models.attention, "flex_block_mask", refuse)
    monkeypatch.setattr(models.attention, "_compiled_flex_attention", refuse)
    q, k, v = random_qkv(q_len=4, kv_len=131_072, heads=1, dim=4)
    out = attend(q, k, v, pattern=AttentionPattern.BLOCK_CAUSAL, block_size=4, backend="flex")
    assert torch.allclose(out, (q @ k.mT / 2).softmax(dim=-1) @ v, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "step"), [(AttentionPattern.BLOCK_CAUSAL, 4), (AttentionPattern.CAUSAL, 1)]
)
@torch.no_grad()
def test_cached_sampling_builds_no_mask(monkeypatch, pattern, step):
    """Through the whole network: a block (or token) at a time costs no mask at any length."""
    monkeypatch.setattr(models.attention, "dense_mask", refuse)
    network = small_dit()
    cache = cache_for(network, batch_size=1, capacity=16)
    for piece in random_tokens(1, 16).split(step, dim=1):
        network(piece, pattern=pattern, kv_cache=cache)
        cache.commit(step)
    assert cache.num_tokens == 16


def test_a_mask_is_built_once():
    """All layers but the last ask for the same mask, and that one in every step."""
    network = small_dit(n_blocks=2)
    tokens = random_tokens(1, 2 * 44)  # a length that no other test uses
    before = dense_mask.cache_info()
    for _ in range(3):
        network(tokens, pattern=AttentionPattern.BLOCK_DIFFUSION)
    after = dense_mask.cache_info()
    assert after.misses == before.misses + 2
    assert after.hits == before.hits + 4


def tensors_of(cached: object) -> list[torch.Tensor]:
    """All tensors of a mask of any kind."""
    if isinstance(cached, torch.Tensor):
        return [cached]
    if isinstance(cached, BlockMask):
        return [x for x in cached.as_tuple() if isinstance(x, torch.Tensor)]
    return [s.hidden for s in cached if s.hidden is not None]


@pytest.mark.parametrize("make", [dense_mask, flex_block_mask, slices_of])
def test_a_mask_made_in_an_evaluation_serves_a_training(make):
    """`mode=ppl_eval then=[train]`: tensors of inference mode may not be saved for a backward."""
    make.cache_clear()
    with torch.inference_mode():
        cached = make(
            AttentionPattern.BLOCK_DIFFUSION, q_len=24, kv_len=24, block_size=4, device=CPU
        )
    assert tensors_of(cached)
    assert not any(tensor.is_inference() for tensor in tensors_of(cached))


def test_training_after_an_evaluation_of_the_same_shape():
    """Through the whole network, and the first evaluation builds all masks."""
    network, tokens = small_dit(), random_tokens(1, 2 * 20)
    for cache in (dense_mask, slices_of):
        cache.cache_clear()
    with torch.inference_mode():
        network(tokens, pattern=AttentionPattern.BLOCK_DIFFUSION)
    network(tokens, pattern=AttentionPattern.BLOCK_DIFFUSION).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
