"""What holds for every sampler: its rows are independent, complete, and end by the same rules."""

import math

import pytest
import torch

from models.denoiser import Denoiser
from models.masks import AttentionPattern
from noise_schedule import get_noise
from sampling.base import SamplerOutput, blank_canvas
from sampling.options import SamplingOptions, make_sampler
from sampling.stopping import ENTROPY_WINDOW
from tests.helpers.random_networks import BOS, MASK, V, generators, network, plain_entropy

LENGTH, BLOCK = 16, 4
# The algorithm, and what is asked of its sampler.
CASES = {
    "first_hitting": ("bd3lm", {}),
    "first_hitting_cached": ("bd3lm", {"kv_cache": True}),
    "two_at_once": ("bd3lm", {"tokens_per_step": 2}),
    "confident": ("bd3lm", {"confidence_threshold": 0.3, "kv_cache": True}),
    "ancestral": ("bd3lm", {"first_hitting": False, "num_steps": 3}),
    "ancestral_cached": ("bd3lm", {"first_hitting": False, "num_steps": 3, "kv_cache": True}),
    "particles": ("bd3lm", {"infill_particles": 3, "kv_cache": True}),
    "mdlm": ("mdlm", {}),
    "mdlm_ancestral": ("mdlm", {"first_hitting": False, "num_steps": 5}),
    "ar": ("ar", {}),
    "ar_cached": ("ar", {"kv_cache": True}),
    "ar_particles": ("ar", {"infill_particles": 3}),
    "sedd": ("sedd", {"num_steps": 6}),
}
SAMPLERS = {"bd3lm": "semi_ar", "mdlm": "semi_ar", "ar": "ar", "sedd": "analytic"}


def parameterization(algo: str) -> str:
    return algo if algo in ("ar", "sedd") else "subs"


def make(case: str, *, window: int = LENGTH, eos: int = BOS, **changes):
    """The sampler of a case; `window` is the whole context of the models without blocks."""
    algo, options = CASES[case]
    return make_sampler(
        SAMPLERS[algo],
        SamplingOptions(**{"min_entropy": None} | options | changes),
        block_size=BLOCK if algo == "bd3lm" else window,
        is_block_causal=algo == "bd3lm",
        mask_index=MASK,
        eos_index=eos,
        noise=get_noise("loglinear"),
    )


def denoiser(case: str, *, length: int = LENGTH) -> Denoiser:
    algo = CASES[case][0]
    size = BLOCK if algo == "bd3lm" else length
    return network(block_size=size, parameterization=parameterization(algo))


def canvas(num_rows: int, length: int = LENGTH) -> torch.Tensor:
    """BOS and masks; in every second row a prompt that ends inside a block, and a token behind."""
    rows = blank_canvas(
        num_rows, length, bos_index=BOS, mask_index=MASK, device=torch.device("cpu")
    )
    rows[1::2, 1:6] = torch.arange(1, 6)
    rows[1::2, 10] = 7
    return rows


@pytest.mark.parametrize("case", CASES)
def test_a_batch_equals_its_rows_alone(case):
    """A batch of 8 is 8 batches of 1, whatever ends first; no mask is left, and nothing given
    changes."""
    sampler, denoise, given = make(case), denoiser(case), canvas(8)
    limits = torch.tensor([16, 16, 12, 15, 16, 11, 7, 16])
    batch = sampler.sample(denoise, given, limits=limits, generator=generators(range(8)))
    assert (batch.tokens != MASK).all() and batch.lengths.tolist() == limits.tolist()
    assert len({tuple(row) for row in batch.tokens.tolist()}) == 8
    for row in range(8):
        alone = sampler.sample(
            denoise, given[row : row + 1], limits=limits[row : row + 1], generator=generators([row])
        )
        assert torch.equal(alone.tokens[0], batch.tokens[row])
        n = limits[row]
        is_given = given[row, :n] != MASK
        assert torch.equal(alone.tokens[0, :n][is_given], given[row, :n][is_given])


class OnlyText:
    """Knows one text, 0 1 2 .. 5 0 1 ..: a token is its distance from the first one it sees."""

    def __init__(self, algo: str):
        self.algo = algo

    def __call__(self, x, sigma=None, *, pattern, kv_cache=None, at=None):
        shift = 1 if pattern is AttentionPattern.CAUSAL else 0
        tokens = (x[:, :1] + torch.arange(x.shape[1]) + shift) % 6
        shape = (*x.shape, V)
        if self.algo == "sedd":
            # p_t(y) / p_t(x) of a masked token is q(y) / (e^sigma - 1), and 1 for what is there.
            ratio = -torch.expm1(sigma.double()).log()[:, None, None]
            there = torch.full(shape, -torch.inf).double().scatter(-1, x[..., None], 0.0)
            is_mask = (x == MASK)[..., None]
            return torch.where(
                is_mask, there.scatter(-1, tokens[..., None], ratio.expand(*x.shape, 1)), there
            )[at]
        return torch.full(shape, -1e6).scatter(-1, tokens[..., None], 0.0)[at]


@pytest.mark.parametrize("case", [case for case in CASES if "cached" not in case])
def test_the_only_possible_text(case):
    """MDLM and AR write beyond what they see at once, too."""
    sampler = make(case, kv_cache=False, window=8)
    rows = canvas(5)
    rows[1::2, 10] = 10 % 6
    output = sampler.sample(OnlyText(CASES[case][0]), rows, generator=generators(range(5)))
    assert torch.equal(output.tokens, (torch.arange(LENGTH) % 6).expand(5, LENGTH))


# --- stop rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["var_length", "stop_on_eos"])
@pytest.mark.parametrize("case", CASES)
def test_each_row_ends_at_its_own_eos(case, key):
    """The first one that was sampled; EOS is the token that comes up most often."""
    denoise, given = denoiser(case), canvas(12)
    free = make(case).sample(denoise, given, generator=generators(range(12)))
    eos = int(free.tokens[given == MASK].mode().values)
    ending = make(case, eos=eos, **{key: True})
    ended = ending.sample(denoise, given, generator=generators(range(12)))
    expected = []
    for row, start in zip(free.tokens.tolist(), given.tolist(), strict=True):
        ends = [i + 1 for i in range(LENGTH) if start[i] == MASK and row[i] == eos]
        expected.append(min(ends, default=LENGTH))
    assert len(set(expected)) > 1, "the rows tell the rules apart"
    assert ended.lengths.tolist() == expected and ended.accepted.all()
    for row, end in enumerate(expected):
        assert torch.equal(ended.tokens[row, :end], free.tokens[row, :end])
        assert (ended.tokens[row, end:] == eos).all()


def looks(case: str, length: int) -> list[int]:
    """After how many tokens the rule is looked at."""
    step = {"bd3lm": BLOCK, "mdlm": length, "ar": 16, "sedd": length}[CASES[case][0]]
    return list(range(step, length + 1, step))


@pytest.mark.parametrize("var_length", [False, True])
@pytest.mark.parametrize("case", ["first_hitting_cached", "ancestral", "mdlm_ancestral",
                                  "ar_cached", "sedd"])  # fmt: skip
def test_each_row_is_judged_by_its_own_entropy(case, var_length):
    """Of the last 256 tokens; rejected at fixed length, cut where lengths vary."""
    length = 320
    denoise, sizes = denoiser(case, length=length), {"window": length}
    rows = blank_canvas(6, length, bos_index=BOS, mask_index=MASK, device=torch.device("cpu"))

    def sample(**changes) -> SamplerOutput:
        sampler = make(case, **sizes, **changes)
        return sampler.sample(denoise, rows, generator=generators(range(6)))

    texts = sample().tokens.tolist()
    at = [end for end in looks(case, length) if end >= ENTROPY_WINDOW]
    lowest = [min(plain_entropy(t[end - ENTROPY_WINDOW : end]) for end in at) for t in texts]
    bound = sum(sorted(lowest)[2:4]) / 2  # half of the rows fall below
    found = sample(min_entropy=bound, var_length=var_length)
    for row, text in enumerate(texts):
        low = [end for end in at if plain_entropy(text[end - ENTROPY_WINDOW : end]) < bound]
        ends = low[:1]
        if var_length:
            ends += [i + 1 for i in range(1, length) if text[i] == BOS]
        assert int(found.lengths[row]) == min(ends, default=length)
        assert bool(found.accepted[row]) == (var_length or not low)
    assert var_length or found.accepted.sum() == 3


# --- how much a pass reveals ---------------------------------------------------------------------


def test_a_threshold_that_all_tokens_pass_reveals_blocks_at_once():
    output = make("confident", kv_cache=False).sample(OnlyText("bd3lm"), canvas(2)[:1])
    assert output.num_forward_passes.tolist() == [LENGTH / BLOCK]


def test_a_threshold_that_no_token_passes_reveals_one_at_a_time():
    sampler = make("confident", confidence_threshold=1.0)
    output = sampler.sample(denoiser("confident"), canvas(2), generator=generators(range(2)))
    assert output.num_denoising_passes.tolist() == [15, 16 - 7]


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_tokens_per_step(number):
    output = make("two_at_once", tokens_per_step=number).sample(OnlyText("bd3lm"), canvas(2))
    masks = [(canvas(2)[row] == MASK).view(-1, BLOCK).sum(dim=1).tolist() for row in range(2)]
    expected = [sum(math.ceil(n / number) for n in row) for row in masks]
    assert output.num_denoising_passes.tolist() == expected


# --- what samplers cannot do ---------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mdlm", "sedd"])
def test_no_cache_where_later_tokens_change_it(case):
    """From Python too, where no configuration is checked; the text would silently be worse."""
    with pytest.raises(ValueError, match="sampling.kv_cache=True: allowed is False"):
        make(case, kv_cache=True)


@pytest.mark.parametrize("number", [0, -1, 2.5])
@pytest.mark.parametrize("case", ["ancestral", "mdlm_ancestral", "sedd"])
def test_a_time_grid_has_steps(case, number):
    with pytest.raises(ValueError, match=f"algo.T={number} .*allowed with algo.sampler="):
        make(case, num_steps=number)
