"""The rotary embedding: what it keeps, and that it knows distances only."""

import math

import torch

from models.masks import AttentionPattern
from models.rotary import Rotary, rotate
from tests.helpers.references import random_tokens, small_dit


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """The vector (d,) at one position."""
    cos, sin = Rotary(x.shape[-1])(torch.tensor([position]))
    return rotate(x[None, None, None], cos=cos, sin=sin).flatten()


def test_pairs_turn_by_position_times_frequency():
    """Entry i and entry i + d/2 are one plane (the rotate-half form), turned by p base^(-2i/d)."""
    x = torch.arange(1.0, 9.0)
    found = rotated(x, 3)
    for i in range(4):
        angle = 3 * 10_000 ** (-2 * i / 8)
        a, b = x[i].item(), x[i + 4].item()
        assert math.isclose(found[i], a * math.cos(angle) - b * math.sin(angle), rel_tol=1e-5)
        assert math.isclose(found[i + 4], b * math.cos(angle) + a * math.sin(angle), rel_tol=1e-5)


def test_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator)
    near = rotated(q, 7) @ rotated(k, 3)
    far = rotated(q, 507) @ rotated(k, 503)
    torch.testing.assert_close(near, far, rtol=0, atol=2e-4)
    assert (rotated(q, 8) @ rotated(k, 3) - near).abs() > 1e-2


def test_lengths_stay():
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(x, 1000).norm(), x.norm())


def test_positions_per_row():
    """A batch may be at different positions; the result is each row's own."""
    rotary = Rotary(8)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    x = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(positions)
    together = rotate(x, cos=cos, sin=sin)
    for row in range(2):
        cos, sin = rotary(positions[row])
        assert torch.equal(together[row], rotate(x[row : row + 1], cos=cos, sin=sin)[0])


def test_bf16_keeps_its_type_and_the_angles_their_precision():
    cos, sin = Rotary(16)(torch.arange(1000, 1004))
    x = torch.randn(1, 1, 4, 16, generator=torch.Generator().manual_seed(0))
    found = rotate(x.bfloat16(), cos=cos, sin=sin)
    assert cos.dtype == torch.float32 and found.dtype == torch.bfloat16
    expected = rotate(x.bfloat16().float(), cos=cos, sin=sin)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)


@torch.no_grad()
def test_network_does_not_notice_a_common_shift():
    network, tokens = small_dit(), random_tokens(2, 8)
    plain = network(tokens, pattern=AttentionPattern.CAUSAL)
    positions = torch.arange(100, 108)
    shifted = network(tokens, pattern=AttentionPattern.CAUSAL, positions=positions)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4)
    spread = network(tokens, pattern=AttentionPattern.CAUSAL, positions=2 * positions)
    assert (spread - plain).abs().max() > 1e-2


@torch.no_grad()
def test_both_halves_of_block_diffusion_count_from_zero():
    network, tokens = small_dit(), random_tokens(2, 16)
    pattern = AttentionPattern.BLOCK_DIFFUSION
    positions = torch.arange(8).repeat(2)
    expected = network(tokens, pattern=pattern, positions=positions)
    assert torch.equal(network(tokens, pattern=pattern), expected)
    counted_on = network(tokens, pattern=pattern, positions=torch.arange(16))
    assert (counted_on - expected).abs().max() > 1e-2


def test_half_precision_leaves_the_angles_alone():
    """`model.bfloat16()` rounded frequencies: at position 1000 an angle was off by radians."""
    rotary = Rotary(8)
    for cast in (rotary.bfloat16, rotary.half, lambda: rotary.to(torch.bfloat16)):
        assert torch.equal(cast().inv_freq, rotary.frequencies())
    assert rotary.double().inv_freq.dtype == torch.float64
    assert rotary.to("meta").inv_freq.is_meta
