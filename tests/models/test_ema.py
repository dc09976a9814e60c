"""The moving average of the weights (its golden values are in tests/parity)."""

import math

import pytest
import torch

import models.ema as ema_module
from models.ema import ExponentialMovingAverage


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize(("decay", "first"), [(0.9999, 2 / 11), (0.1, 0.1)])
def test_decay_ramps_up_to_its_value(decay, first):
    """min(decay, (1 + n) / (10 + n)), n counted from 1 at the first update."""
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = ExponentialMovingAverage([weight], decay=decay)
    weight.data.fill_(1.0)
    ema.update([weight])
    assert math.isclose(ema.shadow[0].item(), 1 - first, rel_tol=1e-6)
    expected = 1 - first
    for n in range(2, 6):
        ema.update([weight])
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d)
        assert math.isclose(ema.shadow[0].item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("group", [2**22, 1000, 6, 1])
def test_rounds_as_the_original_does(group, monkeypatch):
    """However many weights at once, as one tensor after the other, to the bit.

    `lerp` computes the same average with another rounding, 2.4e-7 away on the golden file.
    """
    monkeypatch.setattr(ema_module, "_GROUP", group)
    weights = parameters((1000,), (3, 2), ())
    ema = ExponentialMovingAverage(weights, decay=0.9999)
    expected = [weight.detach().clone() for weight in weights]
    for n in range(1, 4):
        for weight, average in zip(weights, expected, strict=True):
            weight.data.add_(0.1)
            average -= (1 - (1 + n) / (10 + n)) * (average - weight.detach())
        ema.update(weights)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow, expected, strict=True))


def test_swap_exchanges_and_swap_again_restores():
    """EMA weights were not taken back after sampling: training went on from them."""
    weights = parameters((3, 2), (4,))
    ema = ExponentialMovingAverage(weights, decay=0.5)
    for weight in weights:
        weight.data.add_(1.0)
    before = [w.detach().clone() for w in weights], [s.clone() for s in ema.shadow]
    ema.swap(weights)
    for weight, shadow, old_weight, old_shadow in zip(weights, ema.shadow, *before, strict=True):
        assert torch.equal(weight, old_shadow) and torch.equal(shadow, old_weight)
    ema.swap(weights)
    for weight, shadow, old_weight, old_shadow in zip(weights, ema.shadow, *before, strict=True):
        assert torch.equal(weight, old_weight) and torch.equal(shadow, old_shadow)


def test_frozen_parameters_have_no_shadow():
    weights = parameters((2,), (3,))
    weights[0].requires_grad_(False)
    ema = ExponentialMovingAverage(weights, decay=0.9)
    ema.update(weights)
    ema.swap(weights)
    assert [tuple(s.shape) for s in ema.shadow] == [(3,)]


def test_shadow_does_not_follow_in_place_changes():
    weights = parameters((2,))
    ema = ExponentialMovingAverage(weights, decay=0.9)
    weights[0].data.fill_(7.0)
    assert (ema.shadow[0] != 7.0).all()
    assert not ema.shadow[0].requires_grad


def test_state_returns():
    weights = parameters((3, 2), (4,))
    ema = ExponentialMovingAverage(weights, decay=0.9)
    weights[0].data.add_(1.0)
    ema.update(weights)
    state = ema.state_dict()
    assert list(state) == ["decay", "num_updates", "shadow_params"]

    other = ExponentialMovingAverage(parameters((3, 2), (4,), seed=1), decay=0.5)
    other.load_state_dict(state)
    assert (other.decay, other.num_updates) == (0.9, 1)
    assert all(torch.equal(a, b) for a, b in zip(other.shadow, ema.shadow, strict=True))
    ema.shadow[0].zero_()
    assert other.shadow[0].any(), "the loaded tensors must be copies"


@pytest.mark.parametrize("shapes", [[(3, 2)], [(3, 2), (5,)], [(4,), (3, 2)]])
def test_a_state_that_does_not_fit_is_refused(shapes):
    """A list is positional: too few, too many or swapped tensors must not slip through."""
    ema = ExponentialMovingAverage(parameters((3, 2), (4,)), decay=0.9)
    state = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.zeros(s) for s in shapes]}
    with pytest.raises(ValueError, match="ema.shadow_params: .* the network has 2 parameters"):
        ema.load_state_dict(state)
    assert ema.num_updates == 0 and ema.shadow[0].any()


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_out_of_range_names_the_key(decay):
    with pytest.raises(ValueError, match=rf"training.ema={decay}: must lie in \[0, 1\)"):
        ExponentialMovingAverage([], decay=decay)
