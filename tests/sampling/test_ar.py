"""Autoregressive sampling."""

import torch

from models.masks import AttentionPattern
from sampling.ar import AutoregressiveSampler
from sampling.decoding import Decoding
from tests.helpers.toys import BOS, MASK, NUM_DRAWS, TableDenoiser, block_by_block, canvas, fit


def draw(denoiser, *, batch_size=NUM_DRAWS, length=4, seed=0, **settings):
    sampler = AutoregressiveSampler(mask_index=MASK, pad_index=BOS, **settings)
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(denoiser, canvas(batch_size, length), generator=generator)


def test_exact_distribution():
    """Each token is drawn from what the network says at the position before it."""
    denoiser = TableDenoiser()

    def next_token(text):
        """The last entry stands for the token to be drawn."""
        prefix = text[:-1]
        probs = denoiser.probs(prefix, len(prefix) - 1)
        return {(*prefix, token): p for token, p in enumerate(probs)}

    output = draw(denoiser)
    assert fit(output.tokens, block_by_block(next_token, length=4, block_size=1)) > 1e-3
    assert denoiser.patterns == {AttentionPattern.CAUSAL}


def test_one_pass_per_token_after_bos():
    denoiser = TableDenoiser()
    output = draw(denoiser, batch_size=6)
    assert denoiser.num_calls == 3 and output.num_forward_passes.tolist() == [3] * 6
    assert (output.tokens[:, 0] == BOS).all()


def test_the_generator_decides():
    one, two, other = (draw(TableDenoiser(), batch_size=100, seed=s).tokens for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_nucleus_applies():
    tokens = draw(TableDenoiser(), batch_size=100, decoding=Decoding(nucleus_p=1e-9)).tokens
    assert (tokens == tokens[0]).all()
