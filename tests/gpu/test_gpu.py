"""On a CUDA device: FlexAttention, SDPA and every score in memory agree, and training runs.

PyTorch alone is needed here; the comparison with the original is in test_golden.py.
"""

import pytest
import torch

from losses.forward_process import FULL, noise_values, q_xt
from losses.objectives import diffusion_token_losses, masked_mean
from models.attention import attend, resolve_backend
from models.denoiser import Denoiser
from models.masks import AttentionPattern
from noise_schedule import get_noise
from tests.helpers.references import (
    brute_force_mask,
    cache_for,
    naive_attention,
    random_qkv,
    random_tokens,
    small_dit,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

P = AttentionPattern
MASK = 22  # the last id of `small_dit`
N = 208  # no multiple of FlexAttention's 128, nor is 2N
# (pattern, q_len, kv_len, L)
CASES = [
    (P.FULL, N, N, N),
    (P.CAUSAL, N, N, N),
    (P.CAUSAL, 3, N, N),
    (P.BLOCK_CAUSAL, N, N, 4),
    (P.BLOCK_CAUSAL, N, N, 16),
    (P.BLOCK_CAUSAL, 16, N, 16),
    (P.BLOCK_DIFFUSION, 2 * N, 2 * N, 1),
    (P.BLOCK_DIFFUSION, 2 * N, 2 * N, 4),
    (P.BLOCK_DIFFUSION, 2 * N, 2 * N, 16),
    (P.BLOCK_DIFFUSION, 2 * N, 2 * N, N),
]
# Largest difference from float64, for outputs and gradients of order one.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def exact_float32_and_fresh_compiler():
    """No TF32; and the compiler gives up on a function after eight shapes."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_equal_naive(case, backend, dtype):
    pattern, q_len, kv_len, block_size = case
    inputs = [
        x.to(dtype).requires_grad_() for x in random_qkv(q_len=q_len, kv_len=kv_len, device="cuda")
    ]
    twins = [x.detach().double().requires_grad_() for x in inputs]
    weight = random_qkv(q_len=q_len, kv_len=kv_len, device="cuda", seed=1)[0]

    out = attend(*inputs, pattern=pattern, block_size=block_size, backend=backend)
    mask = brute_force_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size)
    expected = naive_attention(*twins, mask=mask)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)

    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for found, twin in zip(inputs, twins, strict=True):
        scale = twin.grad.abs().max().item()
        torch.testing.assert_close(
            found.grad.double(), twin.grad, rtol=0, atol=tolerance * max(scale, 1)
        )


def training_step(network: torch.nn.Module) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one block-diffusion step on fixed noise."""
    denoiser = Denoiser(backbone=network, parameterization="subs", mask_index=MASK)
    x_0 = random_tokens(4, N).cuda()
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(4, N // 4, generator=generator).repeat_interleave(4, dim=1).cuda()
    t = t.clamp(min=0.05)  # no weight of 1,000 on a single token
    u = torch.rand(4, N, generator=generator).cuda()
    noise = get_noise("loglinear")
    values = noise_values(noise, t, interval=FULL, mdlm_loss_scale=False)
    x_t = q_xt(x_0, u=u, move_chance=values.move_chance, mask_index=MASK, ignore_bos=True)
    losses = diffusion_token_losses(
        denoiser,
        x_0,
        x_t=x_t,
        values=values,
        sigma_max=noise.sigma_max,
        pattern=P.BLOCK_DIFFUSION,
    )
    loss = masked_mean(losses, mask=torch.ones_like(losses))
    network.zero_grad()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in network.parameters()]


def assert_same_step(found, expected, *, tolerance: float) -> None:
    """Losses relative, gradients relative to each tensor's largest."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for gradient, twin in zip(found[1], expected[1], strict=True):
        assert (gradient - twin).abs().max() <= tolerance * twin.abs().max() + 1e-7


def test_training_step_with_flex_equals_sdpa():
    sdpa, flex = (small_dit(attn_backend=backend).cuda() for backend in ("sdpa", "flex"))
    assert_same_step(training_step(flex), training_step(sdpa), tolerance=1e-4)


def test_bf16_training_step_with_flex_is_close_to_float32():
    exact = training_step(small_dit(attn_backend="sdpa").cuda())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = training_step(small_dit(attn_backend="flex").cuda())
    assert_same_step(found, exact, tolerance=0.1)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_compiled_training_step_equals_eager(backend):
    network = small_dit(attn_backend=backend).cuda()
    expected = training_step(network)
    assert_same_step(training_step(torch.compile(network)), expected, tolerance=1e-4)


@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_auto_is_flex_for_block_diffusion_alone(backend):
    device = torch.device("cuda")
    for pattern in P:
        expected = "flex" if pattern is P.BLOCK_DIFFUSION else "sdpa"
        assert resolve_backend(backend, pattern=pattern, device=device) == expected


def test_auto_equals_sdpa():
    auto, sdpa = (small_dit(attn_backend=backend).cuda() for backend in ("auto", "sdpa"))
    assert_same_step(training_step(auto), training_step(sdpa), tolerance=1e-4)


@pytest.mark.parametrize(("pattern", "step"), [(P.CAUSAL, 1), (P.BLOCK_CAUSAL, 4)])
@torch.no_grad()
def test_cached_equals_uncached(pattern, step):
    network, tokens = small_dit(attn_backend="auto").cuda(), random_tokens(3, 16).cuda()
    cache = cache_for(network, batch_size=3, capacity=16)
    pieces = []
    for piece in tokens.split(step, dim=1):
        pieces.append(network(piece, pattern=pattern, kv_cache=cache))
        cache.commit(step)
    expected = network(tokens, pattern=pattern)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=2e-5)


def test_long_training_rows_need_no_dense_mask():
    """2N = 16,384: the boolean mask alone has 256 MiB, and the scores of SDPA would have more."""
    q, k, v = (
        x.bfloat16().requires_grad_()
        for x in random_qkv(q_len=16_384, kv_len=16_384, device="cuda")
    )

    def step() -> None:
        attend(q, k, v, pattern=P.BLOCK_DIFFUSION, block_size=16, backend="auto").sum().backward()

    step()  # builds the sparse mask, once, and compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before < 128 * 2**20
    assert q.grad.isfinite().all()
