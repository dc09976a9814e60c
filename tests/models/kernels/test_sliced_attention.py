"""Attention over slices of the mask, beside every score in memory."""

import pytest
import torch

from models import attention
from models.attention import attend
from models.kernels.sliced_attention import sliced_attention, slices_of
from models.masks import AttentionPattern
from tests.helpers.references import brute_force_mask, naive_attention, random_qkv

P = AttentionPattern
CPU = torch.device("cpu")
# (pattern, q_len, kv_len, L): several slices each, also where their size does not divide anything
CASES = [
    (P.FULL, 150, 150, 150),
    (P.CAUSAL, 200, 200, 200),
    (P.CAUSAL, 70, 200, 200),
    (P.BLOCK_CAUSAL, 200, 200, 8),
    (P.BLOCK_CAUSAL, 140, 200, 20),
    (P.BLOCK_CAUSAL, 200, 200, 200),
    *((P.BLOCK_DIFFUSION, 2 * n, 2 * n, size) for n in (96, 144) for size in (1, 3, 16, n)),
    (P.BLOCK_DIFFUSION, 144, 288, 16),
    (P.BLOCK_DIFFUSION, 144, 288, 1),
    (P.BLOCK_DIFFUSION, 144, 288, 144),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_naive(case):
    pattern, q_len, kv_len, block_size = case
    q, k, v = random_qkv(q_len=q_len, kv_len=kv_len)
    mask = brute_force_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size)
    found = sliced_attention(q, k, v, pattern=pattern, block_size=block_size)
    torch.testing.assert_close(
        found.double(), naive_attention(q, k, v, mask=mask), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_naive(case):
    """In float64, where the two differ by rounding alone."""
    pattern, q_len, kv_len, block_size = case
    mask = brute_force_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size)
    inputs = [x.double().requires_grad_() for x in random_qkv(q_len=q_len, kv_len=kv_len)]
    upstream = random_qkv(q_len=q_len, kv_len=kv_len, seed=1)[0].double()
    outputs = (
        sliced_attention(*inputs, pattern=pattern, block_size=block_size),
        naive_attention(*inputs, mask=mask),
    )
    found, expected = (torch.autograd.grad(out, inputs, upstream) for out in outputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bf16_gradients_point_the_same_way():
    inputs = random_qkv(q_len=288, kv_len=288)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = sliced_attention(*leaves, pattern=P.BLOCK_DIFFUSION, block_size=16)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        gradients.append([g.double().flatten() for g in grads])
    for exact, rounded in zip(*gradients, strict=True):
        assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999


@pytest.mark.parametrize("block_size", [1, 4, 16, 128, 1024])
def test_little_is_computed_that_nobody_sees(block_size):
    """At most 1.3 x the visible pairs: a dense mask has 3.9 x, and twice as many at L = N."""
    n = 1024
    sizes = {"q_len": 2 * n, "kv_len": 2 * n, "block_size": block_size}
    slices = slices_of(P.BLOCK_DIFFUSION, device=CPU, **sizes)
    area = sum((s.end - s.start) * sum(end - start for start, end in s.keys) for s in slices)
    visible = area - sum(0 if s.hidden is None else int(s.hidden.sum()) for s in slices)
    assert visible == n * n + n * block_size  # the mask's own count, in closed form
    assert area <= 1.3 * visible


@pytest.mark.parametrize(
    ("dtype", "pattern", "q_len", "kv_len", "is_sliced"),
    [
        (torch.bfloat16, P.BLOCK_DIFFUSION, 256, 256, True),
        (torch.float32, P.BLOCK_DIFFUSION, 512, 512, True),
        (torch.float32, P.BLOCK_DIFFUSION, 256, 512, True),
        (torch.float32, P.BLOCK_DIFFUSION, 256, 256, False),
        (torch.float32, P.BLOCK_CAUSAL, 1024, 1024, True),
        (torch.float32, P.BLOCK_CAUSAL, 512, 512, False),
        (torch.bfloat16, P.FULL, 256, 256, True),
        (torch.float32, P.FULL, 1024, 1024, False),
        (torch.bfloat16, P.FULL, 16, 256, False),
    ],
)
def test_used_where_it_pays(monkeypatch, dtype, pattern, q_len, kv_len, is_sliced):
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs["pattern"])
        return sliced_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "sliced_attention", spy)
    q, k, v = (x.to(dtype) for x in random_qkv(q_len=q_len, kv_len=kv_len))
    attend(q, k, v, pattern=pattern, block_size=16, backend="sdpa")
    assert calls == [pattern] * is_sliced
