"""Model FLOPs: the formula against pairs counted one by one."""

import pytest

from benchmarks.flops import forward_flops
from losses.forward_process import FULL, NLL
from models.dit import DITConfig
from models.masks import AttentionPattern
from tests.helpers.references import sees

N, D, V, LAYERS = 12, 8, 40, 3


def config(block_size: int = N) -> DITConfig:
    return DITConfig(
        vocab_size=V, block_size=block_size, hidden_size=D, cond_dim=4, n_blocks=LAYERS, n_heads=2
    )


def pairs(block_size: int, queries: range) -> int:
    """Counts what the queries of [x_t ; x_0] see."""
    return sum(
        sees(i, j, pattern=AttentionPattern.BLOCK_DIFFUSION, length=N, block_size=block_size)
        for i in queries
        for j in range(2 * N)
    )


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_block_diffusion(block_size):
    """In the last layer the clean half computes keys and values: 2 of the 12 D^2 of a token."""
    noisy, clean = pairs(block_size, range(N)), pairs(block_size, range(N, 2 * N))
    found = forward_flops(config(block_size), algo="bd3lm", length=N, interval=NLL)
    matrices = 2 * 12 * D**2 * N
    head = 2 * D * V * (N - 1)
    assert found.noisy == LAYERS * (matrices + 4 * D * noisy) + head
    assert found.clean == (LAYERS - 1) * (matrices + 4 * D * clean) + 2 * 2 * D**2 * N


def test_one_block_needs_no_clean_half():
    one_block = forward_flops(config(), algo="bd3lm", length=N, interval=FULL)
    assert one_block == forward_flops(config(), algo="mdlm", length=N, interval=FULL)
    assert one_block.clean == 0


def test_autoregressive_has_one_token_less():
    found = forward_flops(config(), algo="ar", length=N, interval=FULL)
    seen = sum(range(1, N))
    layers = LAYERS * (24 * D**2 * (N - 1) + 4 * D * seen)
    assert found.total == layers + 2 * D * V * (N - 1)


def test_half_of_the_positions_are_masked_on_average():
    full, nll = (
        forward_flops(config(), algo="mdlm", length=N, interval=interval).total
        for interval in (FULL, NLL)
    )
    assert nll - full == pytest.approx(2 * D * V * (N - 1) * (1 - 1.001 / 2))
