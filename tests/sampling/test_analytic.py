"""The analytic sampler with an exact score network recovers the distribution."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.masks import AttentionPattern
from noise_schedule import get_noise
from sampling import analytic, decoding
from sampling.analytic import AnalyticSampler
from sampling.decoding import Decoding
from tests.helpers.random_networks import network
from tests.helpers.toys import BOS, MASK, NUM_DRAWS, NUM_TOKENS, V, canvas, fit

LENGTH = 4
# The probability of each token at each position; positions are independent.
MARGINALS = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2], [0.05, 0.9, 0.05], [0.4, 0.4, 0.2]])


class ExactScore:
    """p_t(y) / p_t(x): where x is masked q(y) / (e^sigma - 1), and 1 at y = x."""

    def __init__(self):
        self.sigmas: list[float] = []
        self.patterns: set[AttentionPattern] = set()

    def __call__(self, x, sigma, *, pattern, kv_cache=None, at=None):
        self.sigmas.append(sigma[0].item())
        self.patterns.add(pattern)
        score = torch.zeros(*x.shape, V).double()
        ratio = 1 / torch.expm1(sigma[:, None, None].double())
        score[..., :NUM_TOKENS] = MARGINALS[: x.shape[1]] * ratio
        score = torch.where((x == MASK)[..., None], score, torch.zeros_like(score))
        return score.scatter(-1, x[..., None], 1.0).log()[at]


def draw(score, *, num_steps, batch_size=NUM_DRAWS, seed=0, **changes):
    settings = {"pad_index": BOS, "mask_index": MASK, "noise": get_noise("loglinear")}
    sampler = AnalyticSampler(num_steps=num_steps, **(settings | changes))
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(score, canvas(batch_size, LENGTH), generator=generator)


@pytest.mark.parametrize("noise", ["loglinear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 5, 32])
def test_recovers_the_distribution(num_steps, noise):
    """With the exact score every number of steps is exact for independent tokens."""
    output = draw(ExactScore(), num_steps=num_steps, noise=get_noise(noise))
    expected = {
        (BOS, *rest): float(torch.stack([MARGINALS[i + 1, t] for i, t in enumerate(rest)]).prod())
        for rest in itertools.product(range(NUM_TOKENS), repeat=LENGTH - 1)
    }
    assert (output.tokens != MASK).all()
    assert fit(output.tokens, expected) > 1e-3


def test_tokens_are_revealed_along_the_way():
    """The steps carry the work: what the last denoising has to reveal is next to nothing."""
    masked_before_last = []

    class Watching(ExactScore):
        def __call__(self, x, sigma, **arguments):
            masked_before_last.append((x == MASK).float().mean().item())
            return super().__call__(x, sigma, **arguments)

    draw(Watching(), num_steps=4, batch_size=1000)
    # Of three free positions in four, the share that is masked at t is p(t) = t.
    expected = [0.75 * t for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert masked_before_last == pytest.approx(expected, abs=0.03)


def test_the_network_is_told_the_noise_of_each_step():
    score = ExactScore()
    output = draw(score, num_steps=4, batch_size=3)
    noise = get_noise("loglinear")
    times = torch.linspace(1, 1e-5, 5)
    assert score.sigmas == pytest.approx(noise.total_noise(times).tolist())
    assert score.patterns == {AttentionPattern.FULL}
    assert output.num_forward_passes.tolist() == [5, 5, 5], "T steps and the last denoising"


def test_given_tokens_stay():
    given = canvas(200, LENGTH)
    given[:, 2] = 1
    sampler = AnalyticSampler(
        num_steps=2, pad_index=BOS, mask_index=MASK, noise=get_noise("loglinear")
    )
    tokens = sampler.sample(ExactScore(), given).tokens
    assert (tokens[:, 0] == BOS).all() and (tokens[:, 2] == 1).all() and (tokens != MASK).all()


def test_the_generator_decides():
    one, two, other = (
        draw(ExactScore(), num_steps=3, batch_size=100, seed=s).tokens for s in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


class Doubles(TorchDispatchMode):
    """The most numbers of a float64 tensor."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("nucleus_p", [1.0, 0.9])
def test_scores_of_a_batch_are_never_there_together(nucleus_p, monkeypatch):
    """Several (B, N, V) in float64 were: at batch 64 and GPT-2's tokens 26 GB each."""
    decoding_of = {"decoding": Decoding(nucleus_p=nucleus_p)}
    denoise = network(block_size=LENGTH, parameterization="sedd")
    sampler = AnalyticSampler(
        num_steps=3, pad_index=0, mask_index=22, noise=get_noise("loglinear"), **decoding_of
    )
    rows = torch.full((6, 8), 22)
    rows[:, 0] = rows[1, 3] = 5

    def drawn():
        with Doubles() as doubles:
            output = sampler.sample(denoise, rows, generator=torch.Generator().manual_seed(0))
        return output, doubles.most

    whole, most = drawn()
    assert most == 6 * 7 * 23 - 23, "what is not masked has no scores"
    monkeypatch.setattr(analytic, "MAX_POSITIONS", 16)  # two rows
    for module in (analytic, decoding):
        monkeypatch.setattr(module, "MAX_NUMBERS", 4 * 23)
    parts, most = drawn()
    assert torch.equal(parts.tokens, whole.tokens) and most == 4 * 23
    torch.testing.assert_close(parts.confidence, whole.confidence)
