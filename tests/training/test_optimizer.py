"""The fused optimizer beside torch's plain loop."""

import copy

import pytest
import torch

from tests.helpers.references import generator
from training.optimizer import cosine_decay_with_warmup, fused_adamw, use_settings

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))


def plain_adamw(parameters) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, foreach=False, fused=False, **SETTINGS)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, number: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        seed = generator(10 * number + index)
        parameter.grad = torch.randn(parameter.shape, generator=seed)
    optimizer.step()


def assert_close(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_equals_the_plain_loop():
    fused, plain = network(), network()
    optimizers = fused_adamw(fused.parameters(), **SETTINGS), plain_adamw(plain.parameters())
    assert optimizers[0].param_groups[0]["fused"] is True
    for number in range(4):
        step(fused, optimizers[0], number=number)
        step(plain, optimizers[1], number=number)
        assert_close(fused, plain)


def test_a_state_of_the_plain_form_is_taken_up_fused():
    """torch takes the form from the checkpoint: resumed runs would have stayed slow for good."""
    fused, plain = network(), network()
    old = plain_adamw(plain.parameters())
    step(plain, old, number=0)
    fused.load_state_dict(plain.state_dict())
    saved = copy.deepcopy(old.state_dict())
    optimizer = fused_adamw(fused.parameters(), **SETTINGS)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["fused"] is True
    assert saved["param_groups"][0]["fused"] is False, "what was read is not changed"
    step(plain, old, number=1)
    step(fused, optimizer, number=1)
    assert_close(fused, plain)


@pytest.mark.parametrize("form", ["fused", "plain"])
def test_state_returns_bit_for_bit(form):
    """Also in the plain form, by which a checkpoint of ours may be read elsewhere."""
    first, second = network(), network()
    optimizer = fused_adamw(first.parameters(), **SETTINGS)
    step(first, optimizer, number=0)
    second.load_state_dict(first.state_dict())
    make = plain_adamw if form == "plain" else lambda p: fused_adamw(p, **SETTINGS)
    other = make(second.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(first, optimizer, number=1)
    step(second, other, number=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def learning_rates(steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.pop("lr", 1.0))
    schedule = cosine_decay_with_warmup(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_schedule_at_its_corners():
    """Warm-up from 0.1 to the peak 1 in 10 steps, cosine of 100 steps down to 0.2, then flat."""
    rates = learning_rates(130, t_initial=100, warmup_t=10, warmup_lr_init=0.1, lr_min=0.2)
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.6), "half way down"
    assert rates[110] == pytest.approx(0.2) and rates[129] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_cosine_schedule_that_counts_from_the_start():
    settings = {"t_initial": 100, "warmup_t": 10, "warmup_lr_init": 0.0, "lr_min": 0.0}
    rates = learning_rates(110, warmup_prefix=False, **settings)
    assert rates[50] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)


def test_cosine_schedule_scales_with_the_peak():
    settings = {"t_initial": 10, "warmup_t": 2, "warmup_lr_init": 1e-6, "lr_min": 1e-6}
    rates = learning_rates(15, lr=3e-4, **settings)
    assert rates[0] == pytest.approx(1e-6) and rates[2] == pytest.approx(3e-4)
    assert rates[14] == pytest.approx(1e-6)


def test_cosine_schedule_of_the_configuration(compose):
    """lr_scheduler=cosine_decay_warmup came from timm; it needs no other package now."""
    import hydra

    config = compose(["lr_scheduler=cosine_decay_warmup", "trainer.max_steps=100"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = hydra.utils.instantiate(config.lr_scheduler, optimizer=optimizer)
    assert schedule.get_last_lr() == [pytest.approx(1e-6)]
    for _ in range(100):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(1e-6)]


@pytest.mark.parametrize("schedule", ["lambda", "recursive"])
def test_settings_replace_those_of_a_checkpoint_at_once(schedule):
    """Not from the second step on: the rate in the group is that of the coming step."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = fused_adamw([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if schedule == "recursive":
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    use_settings(optimizer, scheduler, lr=4.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    (group,) = optimizer.param_groups
    assert group["lr"] == 2.0 and scheduler.get_last_lr() == [2.0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.1)
    optimizer.step()
    scheduler.step()
    assert group["lr"] == pytest.approx(4 / 3 if schedule == "lambda" else 1.0)
