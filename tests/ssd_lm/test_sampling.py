"""SSD-LM's sampler: its exact distributions, the original's draws replayed, rows and blocks."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from ssd_model import load_model
from ssd_sampling import (
    RowDraws,
    SSDSettings,
    add_noise,
    alpha_bar,
    project,
    sample_block,
    sample_text,
)

from tests.parity.rows import load_golden
from tests.parity.ssd_lm import ssd_rows
from tests.ssd_lm.conftest import VOCAB_SIZE

TINY = SSDSettings(block_size=5, num_steps=3)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_recorded_draws_give_the_recorded_text(shared):
    """Schedule, tokens and nucleus of the original."""
    rows = list(ssd_rows(shared / "golden" / "ssd_lm"))
    assert len(rows) == 6
    assert [row for row in rows if row.status != "ok"] == []


@pytest.mark.parametrize("name", ["tokens", "selected", "alpha_bar_25", "alpha_bar_prev_1000"])
def test_a_spoilt_recording_fails(shared, tmp_path, name):
    """The comparison sees another text, a token outside the nucleus, another schedule."""
    folder = Path(shutil.copytree(shared / "golden" / "ssd_lm", tmp_path / "ssd_lm"))
    path = folder / "expected.safetensors"
    meta = {"meta": json.dumps(load_golden(path).meta)}
    tensors = load_file(path)
    tensors[name].view(-1)[0] += 1
    folder.chmod(0o755)
    path.unlink()
    save_file(tensors, path, metadata=meta)
    assert "NOT OK" in [row.status for row in ssd_rows(folder)]


@pytest.mark.parametrize("num_steps", [1, 25, 1000])
def test_schedule_falls_from_one_to_zero(num_steps):
    """A block starts as noise alone and ends as tokens alone."""
    values = [alpha_bar(t, num_steps=num_steps) for t in range(num_steps + 1)]
    assert values[0] == 1.0 and values[-1] < 1e-9
    assert values == sorted(values, reverse=True)


def test_projection_keeps_the_token_that_crosses_p():
    """With p = 0.9 of (0.5, 0.3, 0.15, 0.05) three tokens are drawn, as 10 : 6 : 3."""
    probs, count, value = torch.tensor([0.15, 0.05, 0.5, 0.3]), 20_000, 7.0
    logits = probs.log().expand(1, count, 4)
    settings = SSDSettings(block_size=count, top_p=0.9, one_hot_value=value)
    found = project(logits, settings=settings, draws=RowDraws(generators(0)))
    assert found.shape == (1, count, 4)
    assert ((found == value).sum(-1) == 1).all() and ((found == -value).sum(-1) == 3).all()
    shares = (found == value).double().mean((0, 1))
    expected = torch.tensor([3, 0, 10, 6], dtype=torch.float64) / 19
    assert shares[1] == 0
    assert torch.allclose(shares, expected, atol=4 * math.sqrt(0.25 / count))


def test_noise_levels():
    """No noise at t = 0, noise of scale K alone at t = T."""
    clean, noise = torch.full((1, 2, 3), 5.0), torch.randn(1, 2, 3)
    settings = SSDSettings(num_steps=4)
    assert torch.equal(add_noise(clean, noise, t=0, settings=settings), clean)
    assert torch.allclose(add_noise(clean, noise, t=4, settings=settings), 5 * noise, atol=1e-4)


def test_two_steps_have_their_exact_distribution():
    """V = 2, T = 2 and the network x -> x + (b, 0): the law of the result is an integral.

    The gap of x_2 is sqrt(2) K z, so token 0 is drawn with E sigmoid(gap + b). Then the gap of
    x_1 is +-2K sqrt(abar_1) plus noise of variance 2 K^2 (1 - abar_1), and 0 wins above -b.
    """
    bias, scale, count = 1.0, 0.7, 100_000
    settings = SSDSettings(block_size=count, num_steps=2, top_p=1.0, one_hot_value=scale)
    shift = torch.tensor([bias, 0.0])
    tokens = sample_block(
        lambda x_t, context, progress: x_t + shift,
        torch.zeros(1, 1, dtype=torch.int64),
        vocab_size=2,
        settings=settings,
        draws=RowDraws(generators(1)),
    )
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = (-z * z / 2).exp()
    drawn = ((math.sqrt(2) * scale * z + bias).sigmoid() * density).sum() / density.sum()
    signal = alpha_bar(1, num_steps=2)
    sigma = scale * math.sqrt(2 * (1 - signal))
    wins = [
        0.5 * math.erfc(-(sign * 2 * scale * math.sqrt(signal) + bias) / sigma / math.sqrt(2))
        for sign in (1, -1)
    ]
    expected = float(drawn) * wins[0] + (1 - float(drawn)) * wins[1]
    found = (tokens == 0).double().mean().item()
    assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_context_is_the_block_before():
    """T passes per block, told T/T .. 1/T; the first block sees the start, later ones a block."""
    calls = []

    def network(x_t, context, progress):
        calls.append((context.clone(), progress))
        return torch.nn.functional.one_hot((context[:, -1:] + 1).expand(-1, 5), 7) * 50.0

    start = torch.tensor([[0], [2]])
    tokens = sample_text(
        network, start, length=15, vocab_size=7, settings=TINY, draws=RowDraws(generators(0, 1))
    )
    assert tokens.tolist() == [[1] * 5 + [2] * 5 + [3] * 5, [3] * 5 + [4] * 5 + [5] * 5]
    assert [progress for _, progress in calls] == [1, 2 / 3, 1 / 3] * 3
    contexts = [start] * 3 + [tokens[:, :5]] * 3 + [tokens[:, 5:10]] * 3
    assert all(torch.equal(c, e) for (c, _), e in zip(calls, contexts, strict=True))


def test_a_row_does_not_depend_on_its_batch(tiny):
    """Four rows together are the four rows alone; other seeds give other texts."""
    model = load_model(str(tiny))

    def sample(*seeds):
        return sample_text(
            model,
            torch.full((len(seeds), 1), 256),
            length=15,
            vocab_size=VOCAB_SIZE,
            settings=TINY,
            draws=RowDraws(generators(*seeds)),
        )

    together = sample(1, 2, 3, 4)
    assert together.shape == (4, 15) and together.dtype == torch.int64
    assert torch.equal(together, torch.cat([sample(seed) for seed in (1, 2, 3, 4)]))
    assert len({tuple(row) for row in together.tolist()}) == 4


@pytest.mark.parametrize(("length", "nearest"), [(12, "10 and 15"), (3, "5")])
def test_length_must_fill_blocks(length, nearest):
    """The error gives the nearest lengths that do."""
    with pytest.raises(ValueError, match=f"length {length} .*block size 5; .*{nearest}$"):
        sample_text(
            None, torch.zeros(1, 1), length=length, vocab_size=7, settings=TINY, draws=RowDraws([])
        )
