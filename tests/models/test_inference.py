"""The network as samplers run it, beside the network itself."""

import copy

import pytest
import torch
from torch import nn

from models import inference
from models.attention import attend
from models.inference import InferenceDIT, cast_matrices
from models.kernels.packed_linear import PackedLinear, can_pack
from models.masks import AttentionPattern
from tests.helpers.cached_passes import passes
from tests.helpers.references import brute_force_mask, denoiser_of, random_tokens, small_dit

P = AttentionPattern


@pytest.mark.parametrize("pattern", [P.FULL, P.BLOCK_CAUSAL, P.CAUSAL])
@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("logits_at", [False, True])
def test_equals_the_network(pattern, adaln, logits_at):
    """Folded modulations and skipped positions change nothing but the last bits."""
    network = small_dit(block_size=4, adaln=adaln)
    tokens = random_tokens(3, 12)
    at = None
    if logits_at:
        at = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    with torch.no_grad():
        expected = network(tokens, pattern=pattern, logits_at=at)
    found = InferenceDIT(network)(tokens, pattern=pattern, logits_at=at)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [P.BLOCK_CAUSAL, P.CAUSAL])
def test_cached_passes_equal_the_network(pattern):
    network = small_dit(block_size=4)
    expected = passes(network, pattern=pattern)
    torch.testing.assert_close(
        passes(InferenceDIT(network), pattern=pattern), expected, rtol=1e-5, atol=1e-5
    )


def test_bf16_is_as_near_to_float32_as_autocast_is():
    """The rounding differs in places, its size does not."""
    network = small_dit(block_size=4)
    exact = passes(network, pattern=P.BLOCK_CAUSAL)
    rounded = passes(network, pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = InferenceDIT(network)
    found = passes(fast, pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16)
    assert (found - exact).square().mean() < 1.2 * (rounded - exact).square().mean()
    assert (found - exact).abs().max() > 0  # bf16 it is


def test_cast_matrices_changes_nothing_under_autocast():
    """Every linear layer is bf16 then; what stays float32 is float32 under autocast too."""
    network = small_dit(block_size=4)
    expected = passes(network, pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16)
    cast = copy.deepcopy(network)
    cast_matrices(cast, torch.bfloat16)
    assert torch.equal(passes(cast, pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16), expected)
    halves = {m.weight.dtype for m in cast.modules() if isinstance(m, nn.Linear | PackedLinear)}
    assert halves == {torch.bfloat16}
    assert cast.vocab_embed.embedding.dtype == cast.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_of_the_right_precision_are_shared():
    network = small_dit(block_size=4)
    fast = InferenceDIT(network)
    assert fast.blocks[0].up.weight.data_ptr() == network.blocks[0].mlp[0].weight.data_ptr()
    assert fast.head.weight.data_ptr() == network.output_layer.linear.weight.data_ptr()


def test_refuses_a_noise_level():
    with pytest.raises(ValueError, match="sigma is 0"):
        InferenceDIT(small_dit())(random_tokens(1, 4), torch.ones(1), pattern=P.FULL)


def test_no_dropout():
    """A network in training mode still samples without dropout."""
    network = small_dit(dropout=0.5).eval()
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        expected = network(tokens, pattern=P.FULL)
    network.train()
    torch.testing.assert_close(
        InferenceDIT(network)(tokens, pattern=P.FULL), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kv_len", [40, 300, 1008])
@pytest.mark.parametrize("pattern", [P.FULL, P.BLOCK_CAUSAL, P.CAUSAL])
def test_few_queries_equal_sdpa(kv_len, pattern):
    """The CPU's own form for a few tokens against a long cache, in the rounding of bf16."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=g) for n in (8, kv_len, kv_len))
    mask = brute_force_mask(pattern, q_len=8, kv_len=kv_len, block_size=4)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    half = [x.bfloat16() for x in (q, k, v)]
    # Of a cache with room for more, what lies behind the tokens is not a number.
    room = torch.full((2, 2, 3, kv_len + 8, 16), torch.nan, dtype=torch.bfloat16)
    room[0, :, :, :kv_len], room[1, :, :, :kv_len] = half[1:]
    how = {"pattern": pattern, "block_size": 4, "backend": "sdpa"}
    with torch.no_grad():
        found = attend(half[0], *room[:, :, :, :kv_len], **how)
    assert (found - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("num_rows", [1, 5, 48])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.no_grad()
def test_packed_weights_change_nothing(num_rows, has_bias):
    layer = nn.Linear(48, 80, bias=has_bias).bfloat16()
    if not can_pack(layer.weight):
        pytest.skip("this CPU, or this build of torch, has no kernel for packed bf16 weights")
    packed = PackedLinear(layer.weight, layer.bias)
    x = torch.randn(2, num_rows, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(packed(x), layer(x), rtol=0.01, atol=0.01)
    exact = nn.functional.gelu(layer.float()(x.float()), approximate="tanh")
    torch.testing.assert_close(packed.gelu(x).float(), exact, rtol=0.01, atol=0.01)
    assert packed(x).dtype == torch.bfloat16


def test_what_has_no_packed_form():
    """Float32 texts stay what they were; weights of gradients or on a GPU are not touched."""
    assert not can_pack(torch.zeros(4, 4))
    assert not can_pack(torch.zeros(4, 4, device="meta", dtype=torch.bfloat16))


def test_without_the_operators_of_packed_weights(monkeypatch):
    """A build of torch that lacks them samples as before."""
    network = small_dit(block_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = passes(InferenceDIT(network), pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16)
        monkeypatch.setattr(inference, "can_pack", lambda weight: False)
        plain = InferenceDIT(network)
    assert not isinstance(plain.head, PackedLinear)
    expected = passes(plain, pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_what_is_compiled_is_not_packed():
    """The compiler fails on packed weights."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        denoiser = denoiser_of("subs", block_size=4)
        assert denoiser.for_sampling().backbone.head.weight.is_mkldnn == can_pack(
            denoiser.backbone.output_layer.linear.weight.bfloat16()
        )
        assert not denoiser.for_sampling(compiled=True).backbone.inner.head.weight.is_mkldnn
        cast_matrices(denoiser.backbone, torch.bfloat16, packs=False)
        assert not denoiser.for_sampling(compiled=True).backbone.inner.head.weight.is_mkldnn
