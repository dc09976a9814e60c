"""The fused optimizer beside torch's plain loop."""

import copy

import pytest
import torch

from tests.helpers.references import generator
from training.optimizer import fused_adamw

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
