"""The reference step of the benchmarks computes the same losses as the project, and gradients."""

import pytest
import torch

from benchmarks.reference import Reference, ReferenceAverage, dense_block_diffusion_mask
from losses.forward_process import FULL, NLL, ClipInterval
from losses.objectives import masked_mean
from models.ema import ExponentialMovingAverage
from models.masks import AttentionPattern
from tests.helpers.references import brute_force_mask, random_tokens
from tests.helpers.small_module import module

CASES = {
    "ar": (["algo=ar"], FULL),
    "mdlm": (["algo=mdlm"], FULL),
    "sedd": (["algo=sedd"], FULL),
    "bd3lm, L = 4": (["algo=bd3lm", "block_size=4"], FULL),
    "bd3lm, L = 4, clipped": (["algo=bd3lm", "block_size=4"], ClipInterval(0.55, 0.95)),
    "bd3lm, L = 1": (["algo=bd3lm", "block_size=1"], NLL),
    "bd3lm, L = N": (["algo=bd3lm", "block_size=16"], FULL),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_same(compose, tmp_path, case):
    """A ratio of times means something only if both sides compute the same thing.

    The same weights and the same noise, from the same seed: the reference draws as `Diffusion`.
    """
    overrides, interval = CASES[case]
    model = module(compose, tmp_path, *overrides)
    reference = Reference(model)
    x_0 = random_tokens(3, 16, vocab_size=27) + 8
    gradients = []
    losses = []
    for side in (model, reference):
        torch.manual_seed(3)
        losses.append(side.token_losses(x_0, interval=interval))
        masked_mean(losses[-1], mask=torch.ones_like(losses[-1])).backward()
        gradients.append({n: p.grad for n, p in side.backbone.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert losses[0].abs().sum() > 1
    assert list(gradients[0]) == list(gradients[1])  # the names of the weights, in their order
    for name, expected in gradients[1].items():
        found = gradients[0][name]
        if found is None:  # what cannot matter may have no gradient at all
            assert expected is None or not expected.any(), name
        else:
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


def test_weights_are_shared(compose, tmp_path):
    """The reference takes no memory for a second copy of the weights."""
    model = module(compose, tmp_path, "algo=bd3lm", "block_size=4")
    pairs = zip(model.backbone.parameters(), Reference(model).parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize("block_size", [1, 3, 6])
def test_mask_is_that_of_the_contract(block_size):
    found = dense_block_diffusion_mask(
        length=6, block_size=block_size, device=torch.device("cpu")
    )
    expected = brute_force_mask(
        AttentionPattern.BLOCK_DIFFUSION, q_len=12, kv_len=12, block_size=block_size
    )
    assert torch.equal(found, expected)


def test_average_is_that_of_the_project():
    weight = torch.nn.Parameter(torch.randn(5))
    averages = ExponentialMovingAverage([weight], decay=0.9), ReferenceAverage([weight], decay=0.9)
    for _ in range(4):
        with torch.no_grad():
            weight.add_(torch.randn(5))
        averages[0].update([weight])
        averages[1].update()
    torch.testing.assert_close(averages[0].shadow, averages[1].shadow)
