"""Infilling with particles draws from the sampler's distribution given every given token."""

import pytest
import torch

from models.kv_cache import KVCache
from sampling.ar import AutoregressiveSampler
from sampling.options import SamplingOptions, make_sampler
from sampling.particles import ParticleSampler
from sampling.stopping import StopRule
from tests.helpers.exact import (
    ancestral,
    autoregressive,
    complete,
    first_hitting,
    frequencies,
    given,
    total_variation,
)
from tests.helpers.random_networks import generators, network, semi
from tests.helpers.toys import BOS, MASK, Distribution, TableDenoiser, fit
from tests.helpers.toys import semi as semi_of_toys

GAP = (BOS, MASK, MASK, 2)  # the gap is in blocks before the given token, or in its own


def particles(inner, num_particles: int) -> ParticleSampler:
    return ParticleSampler(inner=inner, num_particles=num_particles)


def draw(sampler, denoiser, canvas: tuple[int, ...], *, num_draws: int, seed: int = 0):
    rows = torch.tensor(canvas).repeat(num_draws, 1)
    return sampler.sample(denoiser, rows, generator=torch.Generator().manual_seed(seed))


def conditional(
    denoiser: TableDenoiser,
    canvas: tuple[int, ...],
    *,
    block_size: int,
    num_steps: int | None = None,
) -> Distribution:
    """Of the joint distribution of all positions behind BOS, given the canvas's tokens."""
    blank = (BOS, MASK, MASK, MASK)
    if num_steps is None:
        texts = complete(first_hitting, denoiser, blank, block_size=block_size)
    else:
        texts = complete(
            ancestral, denoiser, blank, block_size=block_size, num_steps=num_steps
        )
    return given(texts, canvas, mask=MASK)


@pytest.mark.parametrize("canvas", [GAP, (BOS, MASK, 1, MASK), (BOS, MASK, 2, 0)])
@pytest.mark.parametrize(("block_size", "num_steps"), [(1, None), (2, None), (4, None), (2, 2)])
def test_the_conditional_distribution(block_size, num_steps, canvas):
    """Chi-square with many particles, where the error of order 1 / K is below what it sees."""
    denoiser = TableDenoiser()
    expected = conditional(denoiser, canvas, block_size=block_size, num_steps=num_steps)
    sampler = particles(semi_of_toys(block_size, num_steps=num_steps), 128)
    output = draw(sampler, denoiser, canvas, num_draws=2_000)
    assert fit(output.tokens, expected) > 1e-3


@pytest.mark.parametrize("canvas", [GAP, (BOS, MASK, 1, MASK)])
def test_autoregressive(canvas):
    """AR infilling sees nothing to the right at all; with particles all of it counts."""
    denoiser = CausalTable(TableDenoiser())
    texts = autoregressive(denoiser.table, (BOS, MASK, MASK, MASK))
    expected = given(texts, canvas, mask=MASK)
    inner = AutoregressiveSampler(mask_index=MASK, pad_index=BOS)
    output = draw(particles(inner, 256), denoiser, canvas, num_draws=2_000)
    assert fit(output.tokens, expected) > 1e-3
    assert fit(draw(inner, denoiser, canvas, num_draws=2_000).tokens, expected) < 1e-6


class CausalTable:
    """Reads a table as the next token's log p: what it says at a text's last position."""

    def __init__(self, table: TableDenoiser):
        self.table = table

    def __call__(self, x, sigma=None, *, pattern, kv_cache=None, at=None):
        assert (at[1] == x.shape[1] - 1).all()
        return self.table.log_p(x)[at]


def test_the_error_shrinks_with_the_number_of_particles():
    """And plain infilling, which sees nothing behind the block, is far from the conditional."""
    denoiser = TableDenoiser()
    expected = conditional(denoiser, GAP, block_size=1)
    plain = draw(semi_of_toys(1), denoiser, GAP, num_draws=20_000)
    errors = [total_variation(frequencies(plain.tokens), expected)]
    for num_particles in (2, 8, 64):
        sampler = particles(semi_of_toys(1), num_particles)
        output = draw(sampler, denoiser, GAP, num_draws=20_000)
        errors.append(total_variation(frequencies(output.tokens), expected))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[-1] < 0.02, errors


def test_one_particle_ignores_what_follows():
    """K = 1 has no choice: it is the joint distribution of the block's unseen positions."""
    denoiser = TableDenoiser()
    plain = draw(semi_of_toys(1), denoiser, GAP, num_draws=5_000)
    single = draw(particles(semi_of_toys(1), 1), denoiser, GAP, num_draws=5_000)
    assert total_variation(frequencies(single.tokens), frequencies(plain.tokens)) < 0.05


# --- with a network ------------------------------------------------------------------------------


def gap_canvas() -> torch.Tensor:
    """Rows whose gaps, prompts and ends differ, 16 tokens."""
    canvas = torch.full((3, 16), 22)
    canvas[:, 0] = BOS
    canvas[0, 6:16] = torch.arange(10)
    canvas[1, :5] = torch.arange(5)
    canvas[1, 9:12] = 7
    canvas[2, 3:9] = 4
    return canvas


LIMITS = torch.tensor([16, 12, 9])


@pytest.mark.parametrize("kind", ["semi_ar", "ar"])
def test_cached_equals_uncached(kind):
    """Resampling reorders the cache's rows; the texts, weights and picks stay the same."""
    canvas = gap_canvas()
    outputs = []
    for use_cache in (False, True):
        if kind == "ar":
            denoise = network(block_size=16, parameterization="ar")
            inner = AutoregressiveSampler(mask_index=22, pad_index=BOS, use_cache=use_cache)
        else:
            denoise, inner = network(block_size=4), semi(4, use_cache=use_cache)
        sampler = particles(inner, 6)
        outputs.append(
            sampler.sample(denoise, canvas, limits=LIMITS, generator=generators(range(3)))
        )
    one, two = outputs
    assert torch.equal(one.tokens, two.tokens)
    torch.testing.assert_close(one.confidence, two.confidence, atol=1e-4, rtol=0)


def test_given_tokens_stay_and_rows_are_independent():
    denoise, canvas = network(block_size=4), gap_canvas()
    sampler = particles(semi(4, use_cache=True), 6)
    shown = []
    output = sampler.sample(
        denoise, canvas, limits=LIMITS, generator=generators(range(3)), on_step=shown.append
    )
    is_given = canvas != 22
    assert torch.equal(output.tokens[is_given], canvas[is_given])
    assert (output.tokens != 22).all() and output.lengths.tolist() == LIMITS.tolist()
    assert all(x.shape == canvas.shape for x in shown)
    assert (output.revealed_at[is_given] == 0).all() and (output.confidence[is_given] == 1).all()
    # Six texts each; every token behind the first gap takes a pass.
    assert output.num_denoising_passes.tolist() == [6 * 15, 6 * 7, 6 * 8]
    alone = sampler.sample(
        denoise, canvas[1:2, :12], limits=LIMITS[1:2], generator=generators([1])
    )
    assert torch.equal(alone.tokens[0], output.tokens[1, :12])


def test_stop_rules_hold_for_the_finished_text():
    """A given EOS is no end, a sampled one is."""
    denoise, canvas = network(block_size=4), gap_canvas()
    sampler = particles(semi(4), 4)
    free = sampler.sample(denoise, canvas, limits=LIMITS, generator=generators(range(3)))
    eos = int(free.tokens[0, 3])
    stopping = particles(semi(4, stop=StopRule(eos_index=eos)), 4)
    output = stopping.sample(denoise, canvas, limits=LIMITS, generator=generators(range(3)))
    for row in range(3):
        sampled = [i for i in range(LIMITS[row]) if canvas[row, i] == 22]
        ends = [i + 1 for i in sampled if free.tokens[row, i] == eos]
        assert output.lengths[row] == min(ends, default=LIMITS[row])


def test_the_cache_selects_rows():
    cache = KVCache(
        n_layers=2, batch_size=3, n_heads=1, capacity=4, head_dim=1,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    rows = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 1)
    for layer in range(2):
        cache.append(layer, k=rows + 10 * layer, v=-rows)
    cache.commit(2)
    cache.select_rows(torch.tensor([2, 2, 0]))
    new = torch.full((3, 1, 1, 1), 99.0)
    for layer in range(2):
        keys, values = cache.append(layer, k=new, v=new)
        expected = torch.tensor([2.0, 2.0, 0.0])
        assert torch.equal(keys[:, 0, 0, 0], expected + 10 * layer)
        assert torch.equal(values[:, 0, 1, 0], -expected)
        assert (keys[:, 0, 2] == 99).all()


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -3, 2.5, "many", True])
def test_impossible_numbers_of_particles(number):
    with pytest.raises(ValueError, match="sampling.infill_particles=.* allowed is null and an int"):
        SamplingOptions(infill_particles=number)


def test_particles_need_an_order_that_is_independent_of_the_tokens():
    with pytest.raises(ValueError, match="null and 1 where sampling.confidence_threshold"):
        SamplingOptions(infill_particles=4, confidence_threshold=0.9)


@pytest.mark.parametrize("number", [None, 1, 4])
def test_options_make_the_sampler(number):
    options = SamplingOptions(infill_particles=number, num_steps=3)
    settings = {
        "block_size": 4, "is_block_causal": True, "mask_index": 9, "eos_index": 0, "noise": None,
    }  # fmt: skip
    for name in ("ar", "semi_ar"):
        sampler = make_sampler(name, options, **settings)
        assert isinstance(sampler, ParticleSampler) == (number == 4)
    if number == 4:
        with pytest.raises(ValueError, match="sampling.infill_particles=4: allowed with algo"):
            make_sampler("analytic", options, **settings)
