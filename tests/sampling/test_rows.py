"""Rows that degenerate are drawn again, alone, a limited number of times."""

import pytest
import torch

from sampling.base import SamplerOutput, blank_canvas, uniform
from sampling.rows import draw_rows

NUM_ROWS, PASSES = 40, 7


class Denoise:
    """Stands for a network that nobody asks."""

    has_static_passes = False

    def for_sampling(self):
        return self


class Moody:
    """Writes one random token per row and rejects it where it is odd; notes how many it drew."""

    def __init__(self):
        self.sizes: list[int] = []
        self.limits: list[list[int]] = []

    def sample(self, denoise, canvas, *, limits, generator, on_step):
        self.limits.append(limits.tolist())
        if on_step is not None:
            on_step(canvas)
        self.sizes.append(len(canvas))
        token = (uniform((len(canvas), 1), device=canvas.device, generator=generator) * 1e6).long()
        passes = torch.full((len(canvas),), PASSES)
        return SamplerOutput(
            tokens=token,
            lengths=limits,
            accepted=token[:, 0] % 2 == 0,
            num_forward_passes=passes,
            num_denoising_passes=passes - 1,
            revealed_at=torch.ones_like(token),
            confidence=torch.ones_like(token, dtype=torch.float32),
        )


class StaticDenoise(Denoise):
    has_static_passes = True


def draw(
    sampler: Moody, *, max_retries: int, rows=range(NUM_ROWS), denoise=None, on_step=None
) -> SamplerOutput:
    canvas = blank_canvas(
        len(rows), 2, bos_index=0, mask_index=9, device=torch.device("cpu")
    )
    limits = torch.tensor([row % 2 + 1 for row in rows])
    return draw_rows(
        sampler, denoise or Denoise(), canvas, seed=3, limits=limits, first_row=rows[0],
        max_retries=max_retries, on_step=on_step,
    )  # fmt: skip


@pytest.mark.parametrize("max_retries", [0, 1, 2, 5])
def test_a_row_is_its_first_accepted_attempt(max_retries):
    """Or its last one; every pass of every attempt counts, the paper's count is the text's."""
    attempts = [draw(Moody(), max_retries=n) for n in range(max_retries + 1)]
    found = attempts[-1]
    for row in range(NUM_ROWS):
        texts = [int(output.tokens[row]) for output in attempts]
        number = next((n for n, text in enumerate(texts) if text % 2 == 0), max_retries)
        assert int(found.tokens[row]) == texts[number]
        assert bool(found.accepted[row]) == (texts[number] % 2 == 0)
        assert int(found.num_forward_passes[row]) == PASSES * (number + 1)
    assert (found.num_denoising_passes == PASSES - 1).all()
    assert found.lengths.tolist() == [row % 2 + 1 for row in range(NUM_ROWS)]


def test_only_rejected_rows_are_drawn_again():
    sampler = Moody()
    draw(sampler, max_retries=100)
    assert sampler.sizes[0] == NUM_ROWS and sampler.sizes == sorted(sampler.sizes, reverse=True)
    assert NUM_ROWS / 4 < sampler.sizes[1] < NUM_ROWS * 3 / 4 and len(sampler.sizes) < 20


def test_retries_do_not_depend_on_the_batch():
    whole = draw(Moody(), max_retries=100)
    assert whole.accepted.all()
    for row in range(NUM_ROWS):
        alone = draw(Moody(), max_retries=100, rows=range(row, row + 1))
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert alone.num_forward_passes[0] == whole.num_forward_passes[row]


def test_static_passes_see_batches_of_one_size():
    """Each number of rejected rows compiled anew, and the fifth one ended the run."""
    plain, static, shown = Moody(), Moody(), []
    expected = draw(plain, max_retries=100)
    found = draw(
        static, max_retries=100, denoise=StaticDenoise(), on_step=lambda x: shown.append(len(x))
    )
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name
    assert set(static.sizes) == {NUM_ROWS} and len(static.sizes) == len(plain.sizes)
    assert shown == plain.sizes, "what fills a batch up is not shown"
    spare = [limits[size:] for limits, size in zip(static.limits, plain.sizes, strict=True)]
    assert all(set(limits) <= {1} for limits in spare), "and asks for nothing"
