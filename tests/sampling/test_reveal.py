"""Which masks a pass reveals, against a plain reading of each rule."""

import pytest
import torch

from sampling.reveal import NOT_MASKED, confident, on_time_grid, one_by_one


def random_masks(num_rows: int = 200, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(num_rows, size, generator=generator) < 0.6
    return masked, torch.rand(num_rows, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 1.0])
def test_confident(threshold):
    """All that pass, the best one where none does, and nothing in a row without masks."""
    masked, confidence = random_masks()
    masked[0] = False
    confidence[1, 2], masked[1, 2] = threshold, True  # exactly as probable as asked for
    found = confident(masked, confidence=confidence, threshold=threshold)
    for row in range(len(masked)):
        open_ = [i for i in range(6) if masked[row, i]]
        passing = [i for i in open_ if confidence[row, i] >= threshold]
        best = sorted(open_, key=lambda i: -confidence[row, i])[:1]
        assert found[row].nonzero()[:, 0].tolist() == (passing or best)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_one_by_one(number):
    """In the order of u, so many at a time."""
    masked, u = random_masks()
    found = one_by_one(masked, u=u, tokens_per_step=number)
    assert (found[~masked] == NOT_MASKED).all()
    for row in range(len(masked)):
        order = sorted((i for i in range(6) if masked[row, i]), key=lambda i: u[row, i])
        assert [int(found[row, i]) for i in order] == [k // number for k in range(len(order))]


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_on_time_grid(num_steps):
    """Masks of one step share a pass, and steps without any are not counted."""
    masked, u = random_masks()
    found = on_time_grid(masked, u=u, num_steps=num_steps)
    assert (found[~masked] == NOT_MASKED).all()
    for row in range(len(masked)):
        step = {i: int(u[row, i] * num_steps) for i in range(6) if masked[row, i]}
        taken = sorted(set(step.values()))
        assert {i: int(found[row, i]) for i in step} == {i: taken.index(s) for i, s in step.items()}
