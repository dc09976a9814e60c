"""The network: initialisation, conditioning, precision, and training against sampling."""

import pytest
import torch

from models.dit import DIT, DITConfig, LayerNorm, Target
from models.masks import AttentionPattern
from tests.helpers.references import cache_for, random_tokens, small_dit

P = AttentionPattern
MASK = 22  # the last id of `small_dit`


def blocks_masked(tokens: torch.Tensor, *, block: int, block_size: int) -> torch.Tensor:
    """The tokens with one block all masked."""
    masked = tokens.clone()
    masked[:, block * block_size : (block + 1) * block_size] = MASK
    return masked


def test_fresh_network_is_uniform():
    """The output layer starts at zero, so every token is equally likely."""
    config = DITConfig(
        vocab_size=23, block_size=4, hidden_size=32, cond_dim=8, n_blocks=2, n_heads=2
    )
    logits = DIT(config)(random_tokens(2, 8), pattern=P.FULL)
    assert logits.shape == (2, 8, 23)
    assert not logits.any()


def test_fresh_blocks_are_the_identity():
    """adaLN starts at zero, gates included: the residual stream is the embedding."""
    config = DITConfig(
        vocab_size=23, block_size=4, hidden_size=32, cond_dim=8, n_blocks=2, n_heads=2
    )
    network, seen = DIT(config).eval(), []
    network.output_layer.norm_final.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    tokens = random_tokens(2, 8)
    network(tokens, pattern=P.FULL)
    assert torch.equal(seen[0], network.vocab_embed(tokens))


def test_odd_head_size_names_the_keys():
    with pytest.raises(ValueError, match="model.hidden_size=36: .* model.n_heads=4"):
        small_dit(hidden_size=36, n_heads=4)


@pytest.mark.parametrize("block_size", [1, 4, 12])
@torch.no_grad()
def test_training_equals_sampling(block_size):
    """Block b of one training pass is what sampling computes from the clean prefix and noisy b.

    That is the point of the three-part mask: all blocks are trained in one pass, each as if the
    text before it had been generated already (paper, section 3.1).
    """
    network = small_dit(block_size=block_size)
    x_0 = random_tokens(2, 12)
    is_masked = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    x_t = torch.where(is_masked, MASK, x_0)
    training = network(torch.cat((x_t, x_0), dim=1), pattern=P.BLOCK_DIFFUSION)
    for start in range(0, 12, block_size):
        end = start + block_size
        seen = torch.cat((x_0[:, :start], x_t[:, start:end]), dim=1)
        sampling = network(seen, pattern=P.BLOCK_CAUSAL)
        torch.testing.assert_close(
            training[:, start:end], sampling[:, start:end], rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_the_clean_half_never_shows_a_token_to_itself():
    """Otherwise the loss would be trivial: x_0 of block b must not reach b's own logits."""
    network, x_0 = small_dit(), random_tokens(1, 12)
    x_t = torch.full_like(x_0, MASK)
    other = x_0.clone()
    other[:, 4:8] = (other[:, 4:8] + 1) % MASK
    plain, changed = (
        network(torch.cat((x_t, clean), dim=1), pattern=P.BLOCK_DIFFUSION) for clean in (x_0, other)
    )
    assert torch.equal(plain[:, :8], changed[:, :8])
    assert (plain[:, 8:] - changed[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", list(P))
@torch.no_grad()
def test_logits_at_selects_from_the_full_logits(pattern):
    """The original ran the 50k-way head on all 2N positions; only masked ones carry loss."""
    network, tokens = small_dit(), random_tokens(2, 16)
    full = network(tokens, pattern=pattern)
    at = torch.rand(full.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.3
    found = network(tokens, pattern=pattern, logits_at=at)
    assert found.shape == (int(at.sum()), 23)
    torch.testing.assert_close(found, full[at], rtol=0, atol=1e-6)


@torch.no_grad()
def test_logits_at_with_sigma_per_position():
    network, tokens = small_dit(), random_tokens(2, 16)
    sigma = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    at = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    full = network(tokens, sigma, pattern=P.BLOCK_DIFFUSION)
    found = network(tokens, sigma, pattern=P.BLOCK_DIFFUSION, logits_at=at)
    torch.testing.assert_close(found, full[at], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma_shape", [None, (3,), (3, 8)])
@torch.no_grad()
def test_positions_select_what_a_mask_does(sigma_shape):
    """Integers, of which nobody need count how many there are."""
    network, tokens = small_dit(), random_tokens(3, 8)
    at = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    sigma = None
    if sigma_shape is not None:
        sigma = torch.rand(sigma_shape, generator=torch.Generator().manual_seed(0))
    full = network(tokens, sigma, pattern=P.FULL)
    for selection in (at, at.flatten().nonzero()[:, 0]):
        found = network(tokens, sigma, pattern=P.FULL, logits_at=selection)
        torch.testing.assert_close(found, full[at], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("sigma", "rows"), [(None, 1), (torch.tensor([0.3, 1.0, 2.0]), 3)])
def test_modulation_has_as_many_products_as_there_are_sigmas(sigma, rows):
    """One row for all became as many rows as there are masks, each with a product of its own.

    Gradients then had to be put back together, sorted, into the one row that they came from.
    """
    network, tokens, seen = small_dit(), random_tokens(3, 8), []
    last = network.output_layer.adaLN_modulation
    last.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:-1].numel()))
    at = torch.arange(0, 24, 2)
    logits = network(tokens, sigma, pattern=P.FULL, logits_at=at)
    assert seen == [rows]
    (gradient,) = torch.autograd.grad(logits.square().sum(), last.weight)
    full = network(tokens, sigma, pattern=P.FULL).flatten(0, 1)[at]
    (expected,) = torch.autograd.grad(full.square().sum(), last.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_sigma_is_sigma_zero():
    network, tokens = small_dit(), random_tokens(3, 8)
    plain = network(tokens, pattern=P.FULL)
    zero = network(tokens, torch.zeros(3), pattern=P.FULL)
    torch.testing.assert_close(plain, zero, rtol=0, atol=1e-5)
    assert (network(tokens, torch.ones(3), pattern=P.FULL) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_every_row_has_its_own_sigma():
    network, tokens = small_dit(), random_tokens(2, 8)
    sigma = torch.tensor([0.3, 2.0])
    both = network(tokens, sigma, pattern=P.FULL)
    for row in range(2):
        alone = network(tokens[row : row + 1], sigma[row : row + 1], pattern=P.FULL)
        torch.testing.assert_close(both[row], alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_block_has_its_own_sigma():
    """The original conditioned a whole row on its first block's sigma.

    A block's logits must depend on its own sigma, and on no other block's: the blocks before it
    are seen clean, and clean text has sigma 0.
    """
    network, x_0 = small_dit(), random_tokens(2, 12)
    x_t = blocks_masked(blocks_masked(x_0, block=0, block_size=4), block=1, block_size=4)
    x = torch.cat((x_t, x_0), dim=1)
    low, high = torch.tensor(0.2).expand(2, 12), torch.tensor(3.0).expand(2, 12)
    all_low = network(x, low, pattern=P.BLOCK_DIFFUSION)
    all_high = network(x, high, pattern=P.BLOCK_DIFFUSION)
    mixed = torch.cat((low[:, :4], high[:, 4:8], low[:, 8:]), dim=1)
    found = network(x, mixed, pattern=P.BLOCK_DIFFUSION)
    for block, expected in ((0, all_low), (1, all_high), (2, all_low)):
        at = slice(4 * block, 4 * block + 4)
        torch.testing.assert_close(found[:, at], expected[:, at], rtol=0, atol=1e-5)
    assert (all_low - all_high).abs().amax(dim=(0, 2)).min() > 1e-3


@torch.no_grad()
def test_sigma_per_position_reaches_every_layer():
    """At L = N the noisy half sees itself alone, so it is the plain network with one sigma."""
    network, x_0 = small_dit(block_size=12), random_tokens(2, 12)
    x_t = blocks_masked(x_0, block=0, block_size=6)
    x = torch.cat((x_t, x_0), dim=1)
    sigma = torch.tensor([0.2, 3.0])
    found = network(x, sigma[:, None].expand(2, 12), pattern=P.BLOCK_DIFFUSION)
    expected = network(x_t, sigma, pattern=P.FULL)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_norm_is_computed_in_float32_for_bf16_input():
    x = (100 + torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    found = LayerNorm(32)(x)
    exact = x.double() - x.double().mean(dim=-1, keepdim=True)
    exact = exact / (exact.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_dropout_only_while_training():
    network, tokens = small_dit(dropout=0.5), random_tokens(2, 8)
    assert torch.equal(network(tokens, pattern=P.FULL), network(tokens, pattern=P.FULL))
    network.train()
    first, second = network(tokens, pattern=P.FULL), network(tokens, pattern=P.FULL)
    assert (first - second).abs().max() > 1e-2
    still = small_dit(dropout=0.0).train()
    assert torch.equal(still(tokens, pattern=P.FULL), still(tokens, pattern=P.FULL))


@pytest.mark.parametrize("pattern", list(P))
def test_bf16_autocast_trains_with_float32_norms(pattern):
    network, tokens = small_dit(dropout=0.0), random_tokens(2, 16)
    norms = []
    for module in network.modules():
        if isinstance(module, LayerNorm):
            module.register_forward_hook(lambda _m, _i, out: norms.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(tokens, pattern=pattern)
    assert found.dtype == torch.bfloat16
    assert norms == [torch.float32] * 5
    expected = network(tokens, pattern=pattern)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@torch.no_grad()
def test_bf16_autocast_with_a_cache():
    network, tokens = small_dit(), random_tokens(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = cache_for(network, batch_size=2, capacity=8, dtype=torch.bfloat16)
        network(tokens[:, :4], pattern=P.BLOCK_CAUSAL, kv_cache=cache)
        cache.commit(4)
        found = network(tokens[:, 4:], pattern=P.BLOCK_CAUSAL, kv_cache=cache)
        expected = network(tokens, pattern=P.BLOCK_CAUSAL)[:, 4:]
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_ar_network_has_no_conditioning():
    network = small_dit(adaln=False)
    assert not any("adaLN" in name or "sigma" in name for name, _ in network.named_parameters())
    tokens = random_tokens(2, 8)
    plain = network(tokens, pattern=P.CAUSAL)
    assert torch.equal(plain, network(tokens, torch.ones(2), pattern=P.CAUSAL))


@torch.no_grad()
def test_causal_logits_know_nothing_of_what_follows():
    network, tokens = small_dit(adaln=False), random_tokens(1, 8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % MASK
    plain, other = network(tokens, pattern=P.CAUSAL), network(changed, pattern=P.CAUSAL)
    torch.testing.assert_close(plain[:, :5], other[:, :5], rtol=0, atol=1e-6)
    assert (plain[:, 5:] - other[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_every_parameter_gets_a_gradient():
    """An unused parameter would make data-parallel training wait for ever."""
    network, x_0 = small_dit(), random_tokens(2, 8)
    x = torch.cat((torch.full_like(x_0, MASK), x_0), dim=1)
    network(x, torch.ones(2), pattern=P.BLOCK_DIFFUSION).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def loss_and_gradients(call, network: DIT, *, pattern: P, num_tokens: int) -> list[torch.Tensor]:
    """Of the scores of masked tokens, as a training asks for them."""
    x_0 = random_tokens(2, num_tokens)
    masked = torch.arange(x_0.numel()).view_as(x_0) % 3 == 0
    x_t = x_0.masked_fill(masked, MASK)
    x = torch.cat((x_t, x_0), dim=1) if pattern is P.BLOCK_DIFFUSION else x_t
    network.zero_grad()
    scores = call(x, pattern=pattern, logits_at=masked, target=Target(x_0[masked], MASK))
    loss = scores.log_p.sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters())]


@pytest.mark.parametrize(
    ("pattern", "num_tokens"),
    # Of 128 tokens and more attention on a CPU is sliced.
    [(P.CAUSAL, 8), pytest.param(P.BLOCK_DIFFUSION, 64, marks=pytest.mark.slow)],
)
def test_a_network_compiled_as_a_whole_has_the_same_gradients(pattern, num_tokens):
    """torch 2.11 traced the output layer's function, and all gradients were wrong."""
    torch._dynamo.reset()
    network = small_dit(n_blocks=1)
    how = {"pattern": pattern, "num_tokens": num_tokens}
    expected = loss_and_gradients(network, network, **how)
    found = loss_and_gradients(torch.compile(network, backend="eager"), network, **how)
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", list(P))
@torch.no_grad()
def test_compiled_equals_eager(pattern):
    """Inductor failed on the three-part mask, where it compared two booleans for equality."""
    torch._dynamo.reset()
    network, tokens = small_dit(), random_tokens(2, 24)
    found = torch.compile(network)(tokens, pattern=pattern)
    torch.testing.assert_close(found, network(tokens, pattern=pattern), rtol=0, atol=1e-5)
