"""The stop rule, row by row, against a plain reading of it."""


import pytest
import torch

from models.masks import AttentionPattern
from sampling.base import Progress
from sampling.semi_ar import SemiAutoregressiveSampler
from sampling.stopping import ENTROPY_WINDOW, StopRule, histogram_entropy
from tests.helpers.random_networks import plain_entropy

EOS, MASK, PAD = 1, 9, 0


def test_entropy_of_each_row():
    tokens = torch.randint(0, 7, (5, ENTROPY_WINDOW), generator=torch.Generator().manual_seed(0))
    tokens[0] = 3
    expected = [plain_entropy(row) for row in tokens.tolist()]
    assert histogram_entropy(tokens).tolist() == pytest.approx(expected, abs=1e-5)


class Dictation:
    """Says the tokens of given rows (B, N), each with certainty."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.num_calls = rows, 0

    def __call__(self, x, sigma=None, *, pattern, kv_cache=None, at=None):
        self.num_calls += 1
        log_p = torch.full((*x.shape, 10), -1e6)
        return log_p.scatter(-1, self.rows[:, : x.shape[1], None], 0.0)[at]


def write(rows: torch.Tensor, rule: StopRule, *, block_size: int = 8):
    sampler = SemiAutoregressiveSampler(
        block_size=block_size,
        mask_index=MASK,
        pad_index=PAD,
        pattern=AttentionPattern.BLOCK_CAUSAL,
        stop=rule,
        num_steps=1,
    )
    canvas = torch.full_like(rows, MASK)
    canvas[:, 0] = rows[:, 0]
    return sampler.sample(Dictation(rows), canvas)


def varied(num_rows: int, length: int) -> torch.Tensor:
    """Rows of tokens 2 to 8, with as much entropy as seven symbols have."""
    return torch.randint(2, 9, (num_rows, length), generator=torch.Generator().manual_seed(0))


def test_each_row_ends_at_its_own_eos():
    """The stop test of the original pooled the batch."""
    rows = varied(3, 40)
    rows[:, 0] = EOS  # BOS is EOS, as in GPT-2: the second one ends the text
    rows[0, 5], rows[1, 23] = EOS, EOS
    output = write(rows, StopRule(eos_index=EOS, is_var_length=True))
    assert output.lengths.tolist() == [6, 24, 40]
    assert output.accepted.all()
    assert torch.equal(output.tokens[0, :6], rows[0, :6]) and (output.tokens[0, 6:] == PAD).all()
    assert output.num_forward_passes.tolist() == [1, 3, 5], "a row that ended costs nothing more"


def test_without_an_eos_rule_eos_is_a_token():
    rows = varied(1, 16)
    rows[0, 3] = EOS
    assert write(rows, StopRule()).lengths.tolist() == [16]


@pytest.mark.parametrize("is_var_length", [False, True])
def test_a_degenerate_row_is_cut_or_rejected(is_var_length):
    rows = varied(2, 400)
    rows[1, 100:] = 4
    rule = StopRule(min_entropy=1.5, is_var_length=is_var_length)
    output = write(rows, rule)
    ends = range(ENTROPY_WINDOW, 401, 8)
    texts = rows[1].tolist()
    expected = next(n for n in ends if plain_entropy(texts[n - ENTROPY_WINDOW : n]) < 1.5)
    assert output.lengths.tolist() == [400, expected]
    assert output.accepted.tolist() == [True, is_var_length]


def test_short_texts_are_not_judged():
    rows = torch.full((1, ENTROPY_WINDOW - 8), 4)
    assert write(rows, StopRule(min_entropy=4.0)).accepted.all()


def test_a_given_eos_does_not_end_a_row():
    canvas = torch.tensor([[EOS, 3, EOS, MASK, MASK]])
    progress = Progress(canvas, mask_index=MASK)
    StopRule(eos_index=EOS).apply(progress, end=4)
    assert progress.is_active.all()


# --- stop strings --------------------------------------------------------------------------------

WORDS = ["", "", "a", "b", "ab", "c.", ".", " ", "é", ""]


def decode(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def plain_end(tokens: list[int], given: int, strings: tuple[str, ...]) -> int:
    """The first token after which the text behind the given ones contains a string."""
    for n in range(given, len(tokens) + 1):
        if any(string in decode(tokens[given:n]) for string in strings):
            return n
    return len(tokens)


@pytest.mark.parametrize("strings", [("ab",), ("c.a", "é é"), ("b.",), ("zzz",), ("bab", ".")])
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_each_row_ends_at_its_own_stop_string(strings, block_size):
    """Across tokens and blocks, with prompts of several lengths, and limits inside a block."""
    rows = varied(60, 24)
    canvas, given = torch.full_like(rows, MASK), [1 + row % 5 for row in range(60)]
    limits = torch.tensor([24 - row % 7 for row in range(60)])
    for row, size in enumerate(given):
        canvas[row, :size] = rows[row, :size]
    sampler = SemiAutoregressiveSampler(
        block_size=block_size,
        mask_index=MASK,
        pad_index=PAD,
        pattern=AttentionPattern.BLOCK_CAUSAL,
        stop=StopRule(stop_strings=strings, decode=decode),
        num_steps=1,
    )
    output = sampler.sample(Dictation(rows), canvas, limits=limits)
    expected = [
        plain_end(rows[row, : limits[row]].tolist(), given[row], strings) for row in range(60)
    ]
    assert output.lengths.tolist() == expected and output.accepted.all()


def test_the_earlier_of_eos_and_stop_string_counts():
    rows = torch.tensor([[0, 2, 3, 7, 1, 2, 2, 2], [0, 2, 1, 7, 2, 3, 2, 2]])
    rule = StopRule(eos_index=EOS, stop_strings=("ab",), decode=decode)
    assert write(rows, rule).lengths.tolist() == [3, 3]


def test_stop_strings_need_a_decoder():
    with pytest.raises(ValueError, match="stop_strings needs `decode`"):
        StopRule(stop_strings=("a",))
