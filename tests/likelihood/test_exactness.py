"""Tiny random networks, whose every text can be asked for: likelihoods against their definitions.

V = 4 with the mask, N = 6, so 3^5 texts.
"""

import dataclasses
import functools
import itertools
import math
from functools import cache

import pytest
import torch

from likelihood.estimators import ORDERS, Estimator
from likelihood.scoring import score
from losses.token_losses import TokenLosses
from models.masks import AttentionPattern as P
from noise_schedule import SCHEDULES, get_noise
from sampling.reveal import PRIORITIES
from tests.helpers.exact import NetworkTable, complete, first_hitting
from tests.helpers.references import p_value
from tests.sampling.test_exactness import BLANK, BOS, MASK, PROMPT, V, draw, network, semi

TEXTS = torch.tensor([(BOS, *rest) for rest in itertools.product(range(V - 1), repeat=5)])
SIZES = [1, 2, 3]


@cache
def losses_of(block_size: int, *, noise: str = "loglinear") -> TokenLosses:
    return TokenLosses(
        denoiser=network(block_size),
        noise=get_noise(noise),
        pattern=P.FULL if block_size == 6 else P.BLOCK_DIFFUSION,
        block_size=block_size,
    )


def log_p(block_size: int, texts: torch.Tensor = TEXTS, *, given=None, **estimator):
    """(B,) nats of whole texts."""
    asked = Estimator(**estimator)
    return score(losses_of(block_size), texts, asked, given=given).log_p.sum(dim=1)


def in_given_order(
    text: tuple[int, ...], *, block_size: int, name: str, tokens_per_pass: int
) -> float:
    """log p by the definition: whole texts, one block and pass after the other."""
    denoise, total = network(block_size), 0.0
    for start in range(0, len(text), block_size):
        block = range(start, start + block_size)
        left = [i for i in block if i > 0]
        for number in range(block_size // tokens_per_pass):
            x = [MASK if i in left else text[i] for i in range(start + block_size)]
            with torch.no_grad():
                found = denoise(torch.tensor([x]), pattern=P.BLOCK_CAUSAL)[0].double()
            if name == "left_to_right":
                now = [i for i in left if (i - start) // tokens_per_pass == number]
            elif name == "strided":
                now = [i for i in left if (i - start) % (block_size // tokens_per_pass) == number]
            else:
                now = sorted(left, key=lambda i: -PLAIN[name](found[i]))[:tokens_per_pass]
            total += sum(float(found[i, text[i]]) for i in now)
            left = [i for i in left if i not in now]
    return total


def _entropy(log_p: torch.Tensor) -> float:
    p = log_p.exp()
    return float(-(p[p > 0] * log_p[p > 0]).sum())


PLAIN = {
    "confidence": lambda log_p: float(log_p.max()),
    "margin": lambda log_p: float(log_p.exp().sort().values.diff()[-1]),
    "entropy": lambda log_p: -_entropy(log_p),
}


def cases():
    for name, size in itertools.product(ORDERS, SIZES):
        yield from ((name, size, k) for k in range(1, size + 1) if size % k == 0)


# --- every text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "block_size", "tokens_per_pass"), list(cases()))
def test_probabilities_in_an_order_sum_to_one(name, block_size, tokens_per_pass):
    settings = {"likelihood": name, "tokens_per_pass": tokens_per_pass}
    found = log_p(block_size, **settings)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    for i in (0, 77, 242):
        text = tuple(TEXTS[i].tolist())
        expected = in_given_order(
            text, block_size=block_size, name=name, tokens_per_pass=tokens_per_pass
        )
        assert found[i].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("block_size", [*SIZES, 6])
def test_any_order_is_the_mean_over_all_orders(block_size):
    """Each order of a block's positions written out; the texts' probabilities sum to one."""
    found = log_p(block_size, likelihood="any_order")
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    for i in (0, 77, 242):
        text = tuple(TEXTS[i].tolist())
        assert found[i].item() == pytest.approx(over_orders(text, block_size), abs=1e-4)


def over_orders(text: tuple[int, ...], block_size: int) -> float:
    """log p by the definition: the mean over the orders of each block."""
    predict, total = cache(functools.partial(_predict, text, block_size)), 0.0
    for start in range(0, len(text), block_size):
        free = [i for i in range(start, start + block_size) if i > 0]
        orders = list(itertools.permutations(free))
        products = [
            math.prod(predict(frozenset(order[n:]))[i] for n, i in enumerate(order))
            for order in orders
        ]
        total += math.log(sum(products) / len(orders))
    return total


def _predict(text: tuple[int, ...], block_size: int, masked: frozenset) -> list[float]:
    """p of the text's token at each position up to the end of the block with the masks."""
    end = (max(masked) // block_size + 1) * block_size
    x = torch.tensor([[MASK if i in masked else text[i] for i in range(end)]])
    with torch.no_grad():
        found = network(block_size)(x, pattern=P.BLOCK_CAUSAL)[0]
    return [float(found[i, text[i]].exp()) for i in range(end)]


@pytest.mark.parametrize("block_size", [*SIZES, 6])
def test_the_bound_is_a_bound(block_size):
    """Per text, by Jensen's inequality; at L = 1 there is one order, and nothing to lose."""
    exact, bound = (log_p(block_size, likelihood=name) for name in ("any_order", "nelbo_exact"))
    assert (exact >= bound - 1e-5).all()
    assert ((exact - bound).max() > 0.01) == (block_size > 1)


@pytest.mark.parametrize("block_size", [2, 3])
def test_mean_of_draws_is_the_exact_nelbo(block_size):
    """400 draws, within three standard errors, and the draws' own error says so."""
    torch.manual_seed(0)
    texts = TEXTS[::40]
    exact = log_p(block_size, texts, likelihood="nelbo_exact").sum().item()
    found = score(losses_of(block_size), texts, Estimator(num_draws=400))
    error = math.sqrt(found.variance.sum())
    assert 0 < error < 0.05 * abs(exact)
    assert abs(found.log_p.sum().item() - exact) < 3 * error


def test_one_draw_is_that_of_an_evaluation():
    torch.manual_seed(3)
    expected = losses_of(3)(TEXTS).double().unflatten(1, (2, 3)).sum(dim=-1)
    torch.manual_seed(3)
    found = score(losses_of(3), TEXTS, Estimator())
    torch.testing.assert_close(-found.log_p, expected)
    assert found.variance is None


@pytest.mark.parametrize("noise", SCHEDULES)
def test_the_exact_nelbo_knows_no_schedule(noise):
    """Each schedule's bound, integrated over all of t, is the same.

    Up to 0.3 % for the floors at 0.001; 0.8 % for `cosine`, which divides by p + 0.001.
    """
    texts = TEXTS[::60]
    exact = -log_p(3, texts, likelihood="nelbo_exact").sum().item()
    losses, total = losses_of(3, noise=noise), 0.0
    root = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000
    values = losses.noise(root**2)  # densely where `square_root` has its pole
    for block in (slice(0, 3), slice(3, 6)):
        num_free = 3 - (block.start == 0)
        for subset in itertools.product([False, True], repeat=num_free):
            masked, n = torch.zeros(6, dtype=torch.bool), sum(subset)
            masked[block.stop - num_free : block.stop] = torch.tensor(subset)
            p = values.move_chance
            weight = (values.loss_scaling * p**n * (1 - p) ** (num_free - n) * 2 * root).mean()
            total += (weight * _log_p_of_masks(losses, texts, masked).sum()).item()
    assert total == pytest.approx(exact, rel=8e-3 if noise == "cosine" else 3e-3)


def _log_p_of_masks(losses: TokenLosses, texts: torch.Tensor, masked: torch.Tensor):
    x_t = torch.where(masked, MASK, texts)
    with torch.no_grad():
        found = losses.denoiser(torch.cat((x_t, texts), dim=1), pattern=P.BLOCK_DIFFUSION)
    return found.gather(-1, texts[..., None])[..., 0].double() * masked


# --- large blocks --------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch):
    """As if a block of three tokens had too many subsets."""
    monkeypatch.setattr("likelihood.estimators.MOST_TOKENS", 2)
    monkeypatch.setattr("likelihood.scoring.MOST_TOKENS", 2)


def test_stratified_draws_have_the_exact_mean(small_limit):
    torch.manual_seed(0)
    texts = TEXTS[::40]
    found = score(losses_of(3), texts, Estimator(likelihood="nelbo_exact", num_draws=100))
    subsets = score(losses_of(3), texts, Estimator(num_draws=100))
    assert found.variance.sum() < subsets.variance.sum() / 4, "and are worth having"
    torch.testing.assert_close(
        found.log_p.sum(), _with_subsets(texts, "nelbo_exact").sum(), rtol=0.02, atol=0
    )
    error = math.sqrt(found.variance.sum())
    assert abs(found.log_p.sum() - _with_subsets(texts, "nelbo_exact").sum()) < 3 * error


def _with_subsets(texts: torch.Tensor, name: str) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("likelihood.scoring.MOST_TOKENS", 10)
        return score(losses_of(3), texts, Estimator(likelihood=name)).log_p


def test_more_orders_make_a_tighter_bound(small_limit):
    """From the NELBO, which is the mean of one order, towards the exact likelihood."""
    texts = TEXTS.repeat(2, 1)
    torch.manual_seed(0)
    found = [
        score(losses_of(3), texts, Estimator(likelihood="any_order", num_orders=s))
        for s in (1, 4, 16)
    ]
    one, four, many = (x.log_p.mean().item() for x in found)
    exact = _with_subsets(texts, "any_order").mean().item()
    nelbo = _with_subsets(texts, "nelbo_exact").mean().item()
    assert one == pytest.approx(nelbo, abs=0.04)
    assert nelbo + 0.01 < four < many < exact + 0.01
    assert many == pytest.approx(exact, abs=0.02)
    assert found[0].variance is None and found[2].variance.mean() < found[1].variance.mean()


# --- contexts and lengths ------------------------------------------------------------------------


def given_prefix(texts: torch.Tensor, num_given: int) -> torch.Tensor:
    return (torch.arange(texts.shape[1]) < num_given).expand(texts.shape)


@pytest.mark.parametrize("name", ["any_order", "left_to_right", "confidence"])
@pytest.mark.parametrize("num_given", [2, 3, 4, 5])
def test_continuations_of_a_prefix_sum_to_one(name, num_given):
    """Also of one that ends inside a block."""
    texts = TEXTS[(TEXTS[:, 1:num_given] == 1).all(dim=1)]
    found = log_p(3, texts, given=given_prefix(texts, num_given), likelihood=name)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_continuation_by_enumeration():
    """As the sampler draws it behind a prompt, which it sees from the start of its block."""
    table = NetworkTable(network(3), pattern=P.BLOCK_CAUSAL)
    expected = complete(first_hitting, table, PROMPT, block_size=3)
    texts = TEXTS[TEXTS[:, 1] == PROMPT[1]]
    found = log_p(3, texts, given=given_prefix(texts, 2), likelihood="any_order").exp()
    for text, p in zip(texts.tolist(), found.tolist(), strict=True):
        assert p == pytest.approx(expected[tuple(text)], rel=1e-4)


@pytest.mark.parametrize("name", ["any_order", "nelbo_exact", *ORDERS])
def test_texts_of_several_lengths_share_a_batch(name):
    """A shorter one ends in masks; it has the same likelihood alone, and in a wider batch."""
    long, short = TEXTS[200], TEXTS[100][:4]
    padded = torch.cat((short, torch.full((2,), MASK)))
    both = log_p(3, torch.stack((long, padded)), likelihood=name)
    alone = [log_p(3, text[None], likelihood=name)[0] for text in (long, short)]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-5, atol=1e-5)
    wider = torch.cat((padded, torch.full((3,), MASK)))[None]
    torch.testing.assert_close(log_p(3, wider, likelihood=name)[0], alone[1], rtol=1e-5, atol=1e-5)


def test_what_lies_behind_a_text_sums_up():
    """Left to right, the likelihood of a text is the sum over all that may follow it."""
    first = TEXTS[:, :5].unique(dim=0)[:7]
    short = log_p(3, first, likelihood="left_to_right").exp()
    longer = [
        log_p(3, torch.cat((text.expand(3, -1), torch.arange(3)[:, None]), dim=1),
              likelihood="left_to_right").exp().sum() for text in first
    ]  # fmt: skip
    torch.testing.assert_close(short, torch.stack(longer), rtol=1e-4, atol=1e-6)


def test_passes_without_a_question_are_left_out_behind_a_context():
    """Blocks of the context ask nothing: fewer passes, where processes need not agree."""
    losses = losses_of(3)
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, *args, **kwargs):
            calls.append(1)
            return losses.denoiser.backbone(*args, **kwargs)

    denoiser = dataclasses.replace(losses.denoiser, backbone=Counting())
    counted = dataclasses.replace(losses, denoiser=denoiser)
    for num_given, expected in ((5, 2), (4, 3), (1, 4)):
        calls.clear()
        asked = Estimator(likelihood="left_to_right")
        score(counted, TEXTS[:2], asked, given=given_prefix(TEXTS[:2], num_given))
        assert len(calls) == expected, "one over the clean text, one per position asked for"
    calls.clear()
    score(counted, TEXTS[:2], Estimator(likelihood="left_to_right"))
    assert len(calls) == 4


# --- what samplers draw --------------------------------------------------------------------------


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of texts (n, N) under the probabilities of `TEXTS`; rare ones are one cell."""
    powers = (V - 1) ** torch.arange(4, -1, -1)
    counts = torch.bincount((tokens[:, 1:] * powers).sum(dim=1), minlength=len(TEXTS)).double()
    mean = expected * len(tokens)
    rare = mean < 5
    pooled = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, mean))
    return p_value(*pooled)


@pytest.mark.slow
def test_first_hitting_draws_what_any_order_says():
    tokens = draw(semi(3), network(3), BLANK)
    assert chi_square(tokens, log_p(3, likelihood="any_order").exp()) > 1e-3
    assert chi_square(tokens, log_p(3, likelihood="left_to_right").exp()) < 1e-6


def drawn_in_order(name: str, *, block_size: int, tokens_per_pass: int, num: int) -> torch.Tensor:
    """Texts of a sampler in that order, written plainly."""
    denoise, x = network(block_size), torch.tensor(BLANK).repeat(num, 1)
    for start in range(0, 6, block_size):
        end = start + block_size
        for number in range(block_size // tokens_per_pass):
            with torch.no_grad():
                found = denoise(x[:, :end], pattern=P.BLOCK_CAUSAL)[:, start:]
            masked = x[:, start:end] == MASK
            position = torch.arange(block_size).expand(masked.shape)
            if name == "left_to_right":
                now = position // tokens_per_pass == number
            elif name == "strided":
                now = position % (block_size // tokens_per_pass) == number
            else:
                wanted = PRIORITIES[name](found.flatten(0, 1)).view(masked.shape)
                best = wanted.masked_fill(~masked, -torch.inf).topk(tokens_per_pass).indices
                now = torch.zeros_like(masked).scatter(1, best, True)
            tokens = torch.multinomial(found.flatten(0, 1).exp(), 1).view(masked.shape)
            x[:, start:end] = torch.where(now & masked, tokens, x[:, start:end])
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block_size", "tokens_per_pass"),
    [*((name, 3, 1) for name in ORDERS), ("left_to_right", 2, 2), ("entropy", 2, 2)],
)
def test_samplers_in_an_order_draw_what_it_says(name, block_size, tokens_per_pass):
    settings = {"block_size": block_size, "tokens_per_pass": tokens_per_pass}
    torch.manual_seed(0)
    tokens = torch.cat([drawn_in_order(name, **settings, num=4_000) for _ in range(50)])
    expected = log_p(block_size, likelihood=name, tokens_per_pass=tokens_per_pass).exp()
    assert chi_square(tokens, expected) > 1e-3


@pytest.mark.parametrize("name", ["any_order", "nelbo_exact", "left_to_right"])
def test_forms_that_share_a_pass_change_nothing(name, monkeypatch):
    """As many subsets as fit go through the network together."""
    texts, sizes = TEXTS[:4], []
    losses = losses_of(3)
    target_scores = type(losses.denoiser).target_scores

    def counted(self, x, *args, **kwargs):
        sizes.append(len(x))
        return target_scores(self, x, *args, **kwargs)

    monkeypatch.setattr(type(losses.denoiser), "target_scores", counted)
    together = log_p(3, texts, likelihood=name)
    assert name == "left_to_right" or sizes == [7 * 4]
    sizes.clear()
    monkeypatch.setattr("likelihood.passes.TOKENS_AT_ONCE", 1)
    torch.testing.assert_close(log_p(3, texts, likelihood=name), together, rtol=1e-5, atol=1e-5)
    assert name == "left_to_right" or sizes == [4] * 7


@pytest.mark.parametrize("padded_to", [5, 9])
def test_rows_are_filled_up_where_shapes_are_compiled(padded_to):
    """`min_rows` changes no number, and no row comes back that was not there."""
    losses = dataclasses.replace(losses_of(3), min_rows=padded_to)
    for name in ("nelbo_exact", "any_order", "entropy"):
        found = score(losses, TEXTS[:4], Estimator(likelihood=name)).log_p
        expected = score(losses_of(3), TEXTS[:4], Estimator(likelihood=name)).log_p
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
