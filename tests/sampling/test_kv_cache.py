"""Sampling with a KV cache gives the texts that sampling without one gives."""

import pytest
import torch

from models.dit import DIT
from sampling import ar, semi_ar, stopping
from sampling.ar import AutoregressiveSampler
from sampling.rows import draw_rows
from sampling.stopping import StopRule
from tests.helpers.random_networks import BOS, MASK, canvas, generators, network, semi

KINDS = {
    "first_hitting": {},
    "two_at_once": {"tokens_per_step": 2},
    "ancestral": {"num_steps": 3},
    "confident": {"confidence_threshold": 0.3},
}


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(kind, block_size):
    """The original's cache crashed with its own network."""
    denoise = network(block_size=block_size)
    one, two = (
        semi(block_size, use_cache=use_cache, **KINDS[kind]).sample(
            denoise, canvas(5, 32), generator=generators(range(5))
        )
        for use_cache in (False, True)
    )
    assert torch.equal(one.tokens, two.tokens) and (two.tokens != MASK).all()
    torch.testing.assert_close(one.confidence, two.confidence, atol=1e-5, rtol=0)
    # A finished block is stored together with the next one's first step: no pass is spent on it.
    assert torch.equal(one.num_forward_passes, two.num_forward_passes)


def test_ar_cached_equals_uncached():
    """The original's AR cache attended to rows of zeros."""
    denoise = network(block_size=32, parameterization="ar")
    settings = {"mask_index": MASK, "pad_index": BOS}
    one, two = (
        AutoregressiveSampler(use_cache=use_cache, **settings).sample(
            denoise, canvas(4, 24), generator=generators(range(4))
        )
        for use_cache in (False, True)
    )
    assert torch.equal(one.tokens, two.tokens)
    assert two.num_forward_passes.tolist() == [23] * 4


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_batch_equals_its_rows_alone(use_cache):
    """The original sampled one row at a time; a batch must not change what a row is."""
    denoise = network(block_size=4)
    sampler = semi(4, use_cache=use_cache)
    batch = sampler.sample(denoise, canvas(8, 16), generator=generators(range(8)))
    for row in range(8):
        alone = sampler.sample(denoise, canvas(1, 16), generator=generators([row]))
        assert torch.equal(alone.tokens[0], batch.tokens[row])


@pytest.mark.parametrize("use_cache", [False, True])
def test_given_tokens_stay_and_are_seen(use_cache):
    """Rows with prompts of different lengths in one batch, which end inside blocks, and a gap."""
    denoise = network(block_size=4)
    given = canvas(4, 16)
    given[1, :3] = torch.tensor([BOS, 5, 6])
    given[2, :10] = torch.arange(10)
    given[3, 6:9] = 7
    sampler = semi(4, use_cache=use_cache)
    output = sampler.sample(denoise, given, generator=generators(range(4)))
    is_given = given != MASK
    assert torch.equal(output.tokens[is_given], given[is_given]) and (output.tokens != MASK).all()
    assert output.num_denoising_passes.tolist() == (~is_given).sum(dim=1).tolist()
    assert (output.revealed_at[is_given] == 0).all() and (output.revealed_at[~is_given] > 0).all()
    other = given.clone()
    other[2, 9] = 15
    changed = sampler.sample(denoise, other, generator=generators(range(4)))
    assert not torch.allclose(changed.confidence[2, 10:], output.confidence[2, 10:])
    assert torch.equal(changed.tokens[:2], output.tokens[:2])


@pytest.mark.parametrize("use_cache", [False, True])
def test_rows_of_different_lengths_share_a_canvas(use_cache):
    """A limit inside a block: the row is what it is alone, and nothing behind it is filled."""
    denoise = network(block_size=4)
    sampler = semi(4, use_cache=use_cache)
    limits = torch.tensor([16, 6, 9])
    output = sampler.sample(denoise, canvas(3, 16), limits=limits, generator=generators(range(3)))
    assert output.lengths.tolist() == [16, 6, 9]
    assert output.num_denoising_passes.tolist() == [15, 5, 8]
    assert (output.tokens[1, 6:] == BOS).all() and (output.tokens != MASK).all()
    alone = sampler.sample(
        denoise, canvas(1, 8), limits=limits[1:2], generator=generators([1])
    )
    assert torch.equal(alone.tokens[0, :6], output.tokens[1, :6])


def test_the_ring_keeps_the_last_window(monkeypatch):
    """Beyond the window memory stays what it was, and a pass sees the window's tokens alone."""
    monkeypatch.setattr(semi_ar, "CONTEXT_WINDOW", 16)
    denoise = network(block_size=4)
    seen = []
    make_cache = DIT.make_cache

    def watched(self, batch_size, *, capacity):
        cache = make_cache(self, batch_size, capacity=capacity)
        append = cache.append

        def append_and_note(layer, *, k, v):
            keys, values = append(layer, k=k, v=v)
            seen.append((cache.num_tokens, k.shape[2], keys.shape[2]))
            return keys, values

        cache.append = append_and_note
        return cache

    monkeypatch.setattr(DIT, "make_cache", watched)
    sampler = semi(4, use_cache=True)
    output = sampler.sample(denoise, canvas(2, 64), generator=generators(range(2)))
    assert (output.tokens != MASK).all()
    assert max(keys for _, _, keys in seen) == 16
    assert all(keys == min(tokens + new, 16) for tokens, new, keys in seen)
    assert {new for _, new, _ in seen} == {4, 8}, "a block, or with the one that is stored with it"
    # Inside the window no pass only stores; beyond it, one for each of the 12 blocks does.
    storing = output.num_forward_passes - output.num_denoising_passes
    assert storing.tolist() == [12, 12] and output.num_denoising_passes.tolist() == [63, 63]


def test_beyond_the_window_the_first_layer_sees_the_same_either_way(monkeypatch):
    """With one layer no token carries older context along, so cache and recomputation agree."""
    monkeypatch.setattr(semi_ar, "CONTEXT_WINDOW", 16)
    monkeypatch.setattr(ar, "CONTEXT_WINDOW", 16)
    denoise = network(block_size=4)
    denoise.backbone.blocks = denoise.backbone.blocks[:1]
    one, two = (
        semi(4, use_cache=use_cache).sample(
            denoise, canvas(3, 48), generator=generators(range(3))
        )
        for use_cache in (False, True)
    )
    assert torch.equal(one.tokens, two.tokens)
    denoise = network(block_size=48, parameterization="ar")
    denoise.backbone.blocks = denoise.backbone.blocks[:1]
    one, two = (
        AutoregressiveSampler(use_cache=use_cache, mask_index=MASK, pad_index=BOS).sample(
            denoise, canvas(3, 48), generator=generators(range(3))
        )
        for use_cache in (False, True)
    )
    assert torch.equal(one.tokens, two.tokens)


def test_bf16_cache_follows_the_precision():
    denoise = network(block_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = denoise.make_cache(2, capacity=8)
        sampler = semi(4, use_cache=True)
        output = sampler.sample(denoise, canvas(2, 16), generator=generators(range(2)))
    assert cache._buffer.dtype == torch.bfloat16 and (output.tokens != MASK).all()


def test_batches_take_over_the_static_cache():
    """Each batch recorded its passes anew, over a new cache, while the last one still lay there."""
    denoise = network(block_size=4).for_sampling(compiled="graphs")
    sampler = semi(4, use_cache=True, stop=StopRule(min_entropy=None))
    found = [draw_rows(sampler, denoise, canvas(3, 16), seed=seed) for seed in (1, 2)]
    kept = [denoise.backbone._layers, dict(denoise.backbone._passes)]
    found += [draw_rows(sampler, denoise, canvas(3, 16), seed=seed) for seed in (1, 2)]
    assert denoise.backbone._layers is kept[0]
    assert denoise.backbone._passes == kept[1] and None not in kept[1].values()
    assert all(torch.equal(found[i].tokens, found[i + 2].tokens) for i in (0, 1))
    plain = draw_rows(sampler, network(block_size=4), canvas(3, 16), seed=1)
    assert torch.equal(found[0].tokens, plain.tokens)


def test_rows_are_drawn_again_in_a_full_batch(monkeypatch):
    """Texts of rows that degenerate, in a batch that is filled up and in one that is not."""
    monkeypatch.setattr(stopping, "ENTROPY_WINDOW", 16)
    sampler = semi(4, use_cache=True, stop=StopRule(min_entropy=1.0))
    texts = []
    for compiled in (False, "graphs"):
        denoise = network(block_size=4).for_sampling(compiled=compiled)
        limits = torch.tensor([24, 22, 23, 24, 21])
        texts.append(draw_rows(sampler, denoise, canvas(5, 24), seed=0, limits=limits))
    for name, value in vars(texts[0]).items():
        if name != "confidence":
            assert torch.equal(getattr(texts[1], name), value), name
    is_second = texts[0].num_forward_passes > texts[0].num_denoising_passes
    assert is_second.any() and not is_second.all(), "some were rejected"
