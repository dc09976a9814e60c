"""The schedules against calculus (their golden values are in tests/parity)."""

import math

import pytest
import torch

from losses.forward_process import FULL, NLL, ClipInterval, noise_values
from noise_schedule import EPS, SCHEDULES, get_noise

NAMES = ["loglinear", "square", "square_root", "log", "cosine"]


def times(name: str) -> torch.Tensor:
    """Float64 times at which the schedule has a derivative: not where p is floored."""
    t = torch.linspace(1e-3, 1, 401, dtype=torch.float64)
    floored = {"square": EPS**0.5, "square_root": EPS**2}
    return t[t > floored.get(name, 0.0) * (1 + 1e-6)].requires_grad_()


def derivative(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), t)[0]


def test_all_schedules_are_there():
    assert list(SCHEDULES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loss_scaling_is_minus_the_derivative_of_log_p(name):
    """The weight of the NELBO is alpha' / (1 - alpha) = -d/dt log p (paper, equation 8).

    The original's schedules other than loglinear crashed, so nothing had ever checked them.
    """
    t = times(name)
    values = get_noise(name)(t)
    # Cosine divides by p + eps: the original's second floor.
    floor = EPS if name == "cosine" else 0.0
    expected = -derivative((values.move_chance + floor).log(), t)
    torch.testing.assert_close(values.loss_scaling, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_move_chance_rate_is_the_derivative(name):
    noise, t = get_noise(name), times(name)
    expected = derivative(noise.move_chance(t), t)
    torch.testing.assert_close(noise.move_chance_rate(t), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "t"), [("square", 0.01), ("square_root", 1e-7)])
def test_power_schedules_are_floored(name, t):
    """p stays at 1e-3 near t = 0; the weight there is the power's rate over the floor."""
    noise = get_noise(name)
    values = noise(torch.tensor([t], dtype=torch.float64))
    exponent = {"square": 2, "square_root": 0.5}[name]
    assert values.move_chance.item() == EPS
    expected = -exponent * t ** (exponent - 1) / EPS
    assert math.isclose(values.loss_scaling.item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_masked_at_one(name):
    values = get_noise(name)(torch.ones(1))
    assert values.move_chance.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_p_rises_within_0_and_1(name):
    p = get_noise(name).move_chance(torch.linspace(1e-3, 1, 1001, dtype=torch.float64))
    assert (p.diff() >= 0).all() and p.min() > 0 and p.max() <= 1 + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_rate_noise_is_the_derivative_of_total_noise(name):
    noise, t = get_noise(name), times(name)
    expected = derivative(noise.total_noise(t), t)
    torch.testing.assert_close(noise.rate_noise(t), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_sigma_max_is_the_total_noise_at_one(name):
    noise = get_noise(name)
    total = noise.total_noise(torch.ones(1, dtype=torch.float64)).item()
    assert math.isclose(noise.sigma_max, total, rel_tol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_mdlm_loss_scale_is_the_same_bound_for_its_own_p(name):
    """p = 1 - e^-sigma, weight -sigma' / (e^sigma - 1): again minus the derivative of log p."""
    noise, t = get_noise(name), times(name)
    values = noise_values(noise, t, interval=FULL, mdlm_loss_scale=True)
    torch.testing.assert_close(values.move_chance, (1 - EPS) * noise.move_chance(t))
    expected = -derivative(values.move_chance.log(), t)
    torch.testing.assert_close(values.loss_scaling, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mdlm_loss_scale", [True, False])
def test_unweighted_above_one_half(name, mdlm_loss_scale):
    """A range above 0.5 trains with weight -1; p stays the schedule's."""
    noise, t = get_noise(name), times(name).detach()
    plain, unweighted = (
        noise_values(noise, t, interval=interval, mdlm_loss_scale=mdlm_loss_scale)
        for interval in (FULL, ClipInterval(0.55, 0.9))
    )
    assert (unweighted.loss_scaling == -1).all()
    assert torch.equal(unweighted.move_chance, plain.move_chance)
    assert (plain.loss_scaling != -1).any()


@pytest.mark.parametrize(
    ("low", "expected"), [(0.5, False), (0.500001, True), (0.3, False), (1.0, True)]
)
def test_one_half_itself_is_weighted(low, expected):
    assert ClipInterval(low, 1.0).is_unweighted is expected
    assert NLL.is_unweighted and not FULL.is_unweighted


@pytest.mark.parametrize("shape", [(3, 8), (3, 1), (5,)])
def test_any_shape_and_float32(shape):
    t = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        values = get_noise(name)(t)
        assert values.loss_scaling.shape == values.move_chance.shape == shape
        assert values.loss_scaling.dtype == torch.float32


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=f"noise.type=linear: allowed are {', '.join(NAMES)}"):
        get_noise("linear")
