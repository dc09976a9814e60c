"""Samplers of a random network against its exact distribution, with and without KV cache.

The network (V = 4 with the mask, N = 6) is asked for every partial text there is, which gives each
sampler's distribution by its definition; 200,000 draws are compared with it by chi-square.
"""

from functools import cache

import pytest
import torch

from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern
from sampling.ar import AutoregressiveSampler
from sampling.blockwise import CONTEXT_WINDOW
from sampling.particles import ParticleSampler
from sampling.semi_ar import SemiAutoregressiveSampler
from tests.helpers.exact import (
    Distribution,
    NetworkTable,
    Text,
    ancestral,
    autoregressive,
    complete,
    first_hitting,
    given,
    total_variation,
)
from tests.helpers.references import p_value

BOS, MASK, V = 0, 3, 4
NUM_DRAWS = 200_000
M = MASK
BLANK = (BOS, M, M, M, M, M)
PROMPT = (BOS, 2, M, M, M, M)  # with L = 3 it ends inside a block
GAPS = (BOS, M, 1, M, M, 2)


@cache
def network(block_size: int, parameterization: str = "subs", vocab_size: int = V) -> Denoiser:
    """Random weights, chosen so that no token is certain and the order of positions matters."""
    torch.manual_seed(101)
    config = DITConfig(
        vocab_size=vocab_size,
        block_size=block_size,
        hidden_size=8,
        cond_dim=4,
        n_blocks=2,
        n_heads=2,
        adaln=parameterization == "subs",
        attn_backend="sdpa",
    )
    backbone = DIT(config).eval()
    for name, parameter in backbone.named_parameters():
        if "norm" in name:
            continue
        torch.nn.init.normal_(parameter, std=1.0 if name.endswith("modulation.bias") else 0.5)
        if name.endswith("modulation.weight"):
            parameter.data *= 0.3
        elif name.endswith("bias") and "modulation" not in name:
            parameter.data.zero_()
    return Denoiser(
        backbone=backbone, parameterization=parameterization, mask_index=vocab_size - 1
    )


@cache
def exact(canvas: Text, *, block_size: int, num_steps: int | None) -> Distribution:
    table = NetworkTable(network(block_size), pattern=AttentionPattern.BLOCK_CAUSAL)
    if num_steps is None:
        return complete(first_hitting, table, canvas, block_size=block_size)
    return complete(ancestral, table, canvas, block_size=block_size, num_steps=num_steps)


@cache
def exact_ar(canvas: Text) -> Distribution:
    table = NetworkTable(network(6, "ar"), pattern=AttentionPattern.CAUSAL)
    return autoregressive(table, canvas)


def semi(block_size: int, *, mask_index: int = MASK, **settings) -> SemiAutoregressiveSampler:
    return SemiAutoregressiveSampler(
        block_size=block_size,
        mask_index=mask_index,
        pad_index=BOS,
        pattern=AttentionPattern.BLOCK_CAUSAL,
        **settings,
    )


def ar(**settings) -> AutoregressiveSampler:
    return AutoregressiveSampler(mask_index=MASK, pad_index=BOS, **settings)


def draw(sampler, denoise, canvas: Text, *, batch_size: int = 2_000, num_draws: int = NUM_DRAWS):
    """Texts (num_draws, N) in batches."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(canvas).repeat(batch_size, 1)
    batches = range(0, num_draws, batch_size)
    return torch.cat([sampler.sample(denoise, rows, generator=generator).tokens for _ in batches])


def fit(tokens: torch.Tensor, expected: Distribution) -> float:
    """p-value of chi-square; texts that should come up less than 5 times are one cell."""
    assert abs(sum(expected.values()) - 1) < 1e-9
    order = {text: i for i, text in enumerate(expected)}
    unique, counts = tokens.unique(dim=0, return_counts=True)
    found = torch.zeros(len(order))
    for text, count in zip(map(tuple, unique.tolist()), counts.tolist(), strict=True):
        if text not in order:
            return 0.0
        found[order[text]] = count
    mean = torch.tensor(list(expected.values())) * len(tokens)
    rare = mean < 5
    pooled = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (found, mean))
    return p_value(*pooled)


KINDS = {"first_hitting": None, "ancestral_1": 1, "ancestral_3": 3}


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_block_samplers(kind, block_size, use_cache):
    sampler = semi(block_size, num_steps=KINDS[kind], use_cache=use_cache)
    tokens = draw(sampler, network(block_size), BLANK)
    expected = exact(BLANK, block_size=block_size, num_steps=KINDS[kind])
    assert fit(tokens, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("canvas", [BLANK, PROMPT, GAPS], ids=["blank", "prompt", "gaps"])
def test_ar(canvas, use_cache):
    tokens = draw(ar(use_cache=use_cache), network(6, "ar"), canvas)
    assert fit(tokens, exact_ar(canvas)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("canvas", [PROMPT, GAPS], ids=["prompt", "gaps"])
@pytest.mark.parametrize("kind", ["first_hitting", "ancestral_3"])
def test_given_tokens_by_the_samplers_own_definition(kind, canvas, use_cache):
    """They are fixed, and seen from the start of their block."""
    sampler = semi(3, num_steps=KINDS[kind], use_cache=use_cache)
    expected = exact(canvas, block_size=3, num_steps=KINDS[kind])
    assert fit(draw(sampler, network(3), canvas), expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize(("batch_size", "num_draws"), [(64, 50_000), (1, 3_000)])
def test_small_batches(batch_size, num_draws, use_cache):
    """The same distribution whatever the batch; another sampler's is told apart.

    Fewer draws than elsewhere, since each takes longer: 30 times as long at batch 1. Rows of a
    batch equal rows alone.
    """
    sampler = semi(3, use_cache=use_cache)
    tokens = draw(sampler, network(3), BLANK, batch_size=batch_size, num_draws=num_draws)
    assert fit(tokens, exact(BLANK, block_size=3, num_steps=None)) > 1e-3
    assert fit(tokens, exact(BLANK, block_size=3, num_steps=1)) < 1e-6
    tokens = draw(
        ar(use_cache=use_cache), network(6, "ar"), BLANK, batch_size=batch_size, num_draws=num_draws
    )
    assert fit(tokens, exact_ar(BLANK)) > 1e-3


@pytest.mark.slow
def test_five_symbols():
    denoise = network(3, vocab_size=5)
    table = NetworkTable(denoise, pattern=AttentionPattern.BLOCK_CAUSAL)
    blank = (BOS, 4, 4, 4, 4, 4)
    tokens = draw(semi(3, mask_index=4, use_cache=True), denoise, blank)
    assert fit(tokens, complete(first_hitting, table, blank, block_size=3)) > 1e-3


# --- limits --------------------------------------------------------------------------------------


def test_ancestral_becomes_first_hitting():
    """The error falls like 1 / T: two positions in one step become rare."""
    limit = exact(BLANK, block_size=3, num_steps=None)
    errors = [
        total_variation(exact(BLANK, block_size=3, num_steps=steps), limit)
        for steps in (1, 4, 16, 64)
    ]
    assert errors[0] > 0.05
    assert all(later < earlier / 3 for earlier, later in zip(errors, errors[1:], strict=False))


@pytest.mark.slow
def test_ancestral_with_many_steps_draws_as_first_hitting():
    tokens = draw(semi(3, num_steps=100_000), network(3), BLANK)
    assert fit(tokens, exact(BLANK, block_size=3, num_steps=None)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("kind", ["L=1", "L=2", "L=3", "ar"])
def test_particles_draw_from_the_conditional(kind, use_cache):
    """p(gaps | all given tokens) of the joint distribution; plain infilling has another."""
    if kind == "ar":
        denoise, inner = network(6, "ar"), ar(use_cache=use_cache)
        expected = given(exact_ar(BLANK), GAPS, mask=MASK)
    else:
        block_size = int(kind[-1])
        denoise, inner = network(block_size), semi(block_size, use_cache=use_cache)
        joint = exact(BLANK, block_size=block_size, num_steps=None)
        expected = given(joint, GAPS, mask=MASK)
    sampler = ParticleSampler(inner=inner, num_particles=64)
    assert fit(draw(sampler, denoise, GAPS, batch_size=500, num_draws=4_000), expected) > 1e-3
    assert fit(draw(inner, denoise, GAPS, num_draws=20_000), expected) < 1e-6


# --- passes and memory ---------------------------------------------------------------------------


class Certain:
    """A network that runs, and is then overruled: position i of a text can only be i % 7.

    Counts its passes, and the longest run of keys that any of them attended to.
    """

    def __init__(self, denoise: Denoiser):
        self.denoise, self.num_passes, self.most_keys = denoise, 0, 0

    def make_cache(self, batch_size: int, *, capacity: int):
        self.cache = self.denoise.make_cache(batch_size, capacity=capacity)
        append = self.cache.append

        def watched(layer, *, k, v):
            keys, values = append(layer, k=k, v=v)
            self.most_keys = max(self.most_keys, keys.shape[2])
            return keys, values

        self.cache.append = watched
        return self.cache

    def __call__(self, x, sigma=None, *, pattern, kv_cache=None, at=None):
        self.num_passes += 1
        log_p = self.denoise(x, pattern=pattern, kv_cache=kv_cache, at=at)
        first = 0 if kv_cache is None else kv_cache.num_tokens
        shift = 1 if pattern is AttentionPattern.CAUSAL else 0
        position = (first + shift + torch.arange(x.shape[1])).expand(x.shape)[at]
        return torch.full_like(log_p, -1e6).scatter(-1, position[:, None] % 7, 0.0)


@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_first_hitting_takes_one_pass_per_token(block_size, use_cache):
    """With a cache too, inside the window; and the only possible text comes out."""
    certain = Certain(network(block_size, vocab_size=8))
    canvas = torch.full((3, 64), 7)
    canvas[:, 0] = BOS
    sampler = semi(block_size, mask_index=7, use_cache=use_cache)
    output = sampler.sample(certain, canvas)
    assert torch.equal(output.tokens, (torch.arange(64) % 7).expand(3, 64))
    assert certain.num_passes == 63
    assert output.num_forward_passes.tolist() == [63] * 3


@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
def test_ar_takes_one_pass_per_token(use_cache):
    certain = Certain(network(64, "ar", vocab_size=8))
    canvas = torch.full((3, 64), 7)
    canvas[:, 0] = BOS
    sampler = AutoregressiveSampler(mask_index=7, pad_index=BOS, use_cache=use_cache)
    output = sampler.sample(certain, canvas)
    assert torch.equal(output.tokens, (torch.arange(64) % 7).expand(3, 64))
    assert certain.num_passes == 63 and output.num_forward_passes.tolist() == [63] * 3


def test_a_long_text_in_bounded_memory():
    """8,192 tokens: the cache keeps 1,024, and no pass attends to more."""
    certain = Certain(network(64, vocab_size=8))
    canvas = torch.full((1, 8_192), 7)
    canvas[:, 0] = BOS
    sampler = semi(64, mask_index=7, use_cache=True, tokens_per_step=8)
    output = sampler.sample(certain, canvas)
    assert torch.equal(output.tokens[0], torch.arange(8_192) % 7)
    assert certain.cache.capacity == certain.most_keys == CONTEXT_WINDOW
    blocks, stored = 8_192 // 64, (8_192 - CONTEXT_WINDOW) // 64
    assert certain.num_passes == blocks * 8 + stored == int(output.num_forward_passes)
