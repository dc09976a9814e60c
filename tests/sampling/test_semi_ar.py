"""The block samplers draw from the distribution that their definition gives."""

import math

import pytest
import torch

from models.masks import AttentionPattern
from sampling import decoding
from sampling.base import SamplerOutput
from sampling.blockwise import CONTEXT_WINDOW
from sampling.decoding import Decoding
from tests.helpers import random_networks
from tests.helpers.exact import ancestral, first_hitting
from tests.helpers.toys import (
    BOS,
    MASK,
    NUM_DRAWS,
    NUM_TOKENS,
    TableDenoiser,
    V,
    block_by_block,
    canvas,
    fit,
)
from tests.helpers.toys import semi as sampler


def draw(sampler, denoiser, *, batch_size=NUM_DRAWS, length=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(denoiser, canvas(batch_size, length), generator=generator)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_first_hitting_has_its_exact_distribution(block_size):
    denoiser = TableDenoiser()
    output = draw(sampler(block_size), denoiser)
    expected = block_by_block(
        lambda text: first_hitting(denoiser, text), length=4, block_size=block_size
    )
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-9)
    assert fit(output.tokens, expected) > 1e-3
    assert denoiser.patterns == {AttentionPattern.BLOCK_CAUSAL}


@pytest.mark.parametrize(("block_size", "num_steps"), [(1, 3), (2, 1), (2, 4), (4, 3)])
def test_ancestral_has_its_exact_distribution(block_size, num_steps):
    denoiser = TableDenoiser()
    output = draw(sampler(block_size, num_steps=num_steps), denoiser)
    expected = block_by_block(
        lambda text: ancestral(denoiser, text, num_steps=num_steps),
        length=4,
        block_size=block_size,
    )
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-9)
    assert fit(output.tokens, expected) > 1e-3


def test_the_orders_matter_to_this_test():
    """The samplers' distributions are told apart, so the tests above can fail."""
    denoiser = TableDenoiser()
    output = draw(sampler(2), denoiser)
    wrong = block_by_block(
        lambda text: ancestral(denoiser, text, num_steps=1), length=4, block_size=2
    )
    assert fit(output.tokens, wrong) < 1e-6


@pytest.mark.parametrize("num_steps", [None, 1, 7])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_certain_network_writes_its_only_text(block_size, num_steps):
    denoiser = TableDenoiser(at_position=lambda i: (i + 1) % NUM_TOKENS)
    output = draw(sampler(block_size, num_steps=num_steps), denoiser, batch_size=50)
    assert (output.tokens == torch.tensor([BOS, 2, 0, 1])).all()


@pytest.mark.parametrize(("block_size", "length"), [(1, 4), (2, 4), (4, 4), (2, 2)])
def test_first_hitting_takes_one_pass_per_token(block_size, length):
    """First-hitting took T passes per block and with T < L left masks in the text."""
    denoiser = TableDenoiser()
    output = draw(sampler(block_size), denoiser, batch_size=5, length=length)
    assert denoiser.num_calls == length - 1, "BOS is given"
    assert output.num_forward_passes.tolist() == [length - 1] * 5


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_ancestral_leaves_no_mask(block_size, num_steps):
    """The last step left masks, 12.8 % of the text at T = 4, which became token 0."""
    output = draw(sampler(block_size, num_steps=num_steps), TableDenoiser(), batch_size=500)
    assert output.tokens.shape == (500, 4) and (output.tokens != MASK).all()


def test_a_step_that_reveals_nothing_costs_no_pass():
    """A thousand steps for three tokens are three passes per row at most."""
    output = draw(sampler(4, num_steps=1000), TableDenoiser(), batch_size=200)
    assert output.num_forward_passes.max() == 3 and output.num_forward_passes.min() >= 2
    one = draw(sampler(4, num_steps=1), TableDenoiser(), batch_size=200)
    assert (one.num_forward_passes == 1).all()


@pytest.mark.parametrize("num_steps", [None, 3])
def test_rows_begin_with_bos(num_steps):
    output = draw(sampler(2, num_steps=num_steps), TableDenoiser(), batch_size=100)
    assert (output.tokens[:, 0] == BOS).all()


@pytest.mark.parametrize("num_steps", [None, 3])
def test_the_generator_decides(num_steps):
    """Same seed, same texts, whatever the global random state; another seed, others."""
    one = draw(sampler(2, num_steps=num_steps), TableDenoiser(), batch_size=100)
    torch.rand(7)
    two = draw(sampler(2, num_steps=num_steps), TableDenoiser(), batch_size=100)
    other = draw(sampler(2, num_steps=num_steps), TableDenoiser(), batch_size=100, seed=1)
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, other.tokens)


def test_nucleus_applies():
    """At p close to 0 only the most probable token is left, and the text is its greedy one."""
    denoiser = TableDenoiser()
    output = draw(sampler(1, decoding=Decoding(nucleus_p=1e-9)), denoiser, batch_size=20)
    text = (BOS,)
    while len(text) < 4:
        probs = denoiser.probs((*text, MASK), len(text))
        text = (*text, probs.index(max(probs)))
    assert (output.tokens == torch.tensor(text)).all()


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("candidates", "is_redone"), [(2, True), (20, True), (23, False)])
def test_guessed_nuclei(candidates, is_redone, use_cache, monkeypatch):
    """On a GPU a block is drawn among so many candidates, and again where they were too few."""
    random = random_networks.network(block_size=4)
    settings = {"use_cache": use_cache, "decoding": Decoding(nucleus_p=0.999, temperature=3.0)}
    passes = []

    def draw_rows() -> SamplerOutput:
        return random_networks.semi(4, **settings).sample(
            random,
            random_networks.canvas(3, 24),
            generator=random_networks.generators(range(3)),
            on_step=lambda x: passes.append(0),
        )

    expected, num_passes = draw_rows(), len(passes)
    monkeypatch.setattr(decoding, "runs_ahead", lambda device: True)
    monkeypatch.setattr(decoding, "GUESSED_CANDIDATES", candidates)
    found = draw_rows()
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.revealed_at, expected.revealed_at)
    assert torch.equal(found.num_forward_passes, expected.num_forward_passes)
    torch.testing.assert_close(found.confidence, expected.confidence)
    again = len(passes) - 2 * num_passes
    # The first block, and then one in 16 at most.
    assert again == (3 if is_redone else 0)


# --- texts longer than what the network sees -------------------------------------------------


class Recorder:
    """Uniform over the tokens; remembers the length and the masks of each text it was shown."""

    def __init__(self):
        self.shown: list[tuple[int, int]] = []

    def __call__(self, x, sigma=None, *, pattern, kv_cache=None, at=None):
        self.shown.append((x.shape[1], int((x[0] == MASK).sum())))
        log_p = torch.full((*x.shape, V), -math.log(NUM_TOKENS))
        log_p[..., MASK] = -1e6
        return log_p if at is None else log_p[at]


@pytest.mark.parametrize("length", [8, 12, 16, 22])
def test_mdlm_writes_in_windows_that_overlap_by_half(length):
    """First a whole block, then half a block at a time behind half a block of context."""
    recorder = Recorder()
    output = draw(sampler(8, pattern=AttentionPattern.FULL), recorder, batch_size=3, length=length)
    assert output.tokens.shape == (3, length) and (output.tokens != MASK).all()
    assert len(recorder.shown) == length - 1
    assert recorder.shown[:7] == [(8, n) for n in range(7, 0, -1)]
    later = [(8, n) for _ in range(8, length, 4) for n in range(4, 0, -1)]
    assert recorder.shown[7:] == (later if length % 4 == 0 else [*later[:-4], (8, 2), (8, 1)])


def test_mdlm_in_blocks_of_one_ends():
    """Half of one is no step at all, and the loop went on forever."""
    output = draw(sampler(1, pattern=AttentionPattern.FULL), Recorder(), batch_size=2, length=5)
    assert output.tokens.shape == (2, 5)


def test_the_context_is_bounded():
    """A block sees at most the last 1,024 tokens, itself included."""
    recorder = Recorder()
    length = CONTEXT_WINDOW + 512
    output = draw(sampler(256, num_steps=1), recorder, batch_size=1, length=length)
    assert output.tokens.shape == (1, length)
    assert [shown for shown, _ in recorder.shown] == [256, 512, 768, 1024, 1024, 1024]
