"""`attend` on both backends against a softmax with every score in memory."""

import functools
import logging

import pytest
import torch
from torch._dynamo.utils import counters

from models import attention, compiling
from models.attention import attend, resolve_backend
from models.masks import AttentionPattern
from tests.helpers.references import brute_force_mask, naive_attention, random_qkv

P = AttentionPattern
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# (pattern, q_len, kv_len, L)
CASES = [
    (P.FULL, 12, 12, 4),
    (P.FULL, 3, 12, 4),
    (P.CAUSAL, 12, 12, 12),
    (P.CAUSAL, 1, 12, 12),
    (P.CAUSAL, 5, 12, 12),
    (P.BLOCK_CAUSAL, 12, 12, 1),
    (P.BLOCK_CAUSAL, 12, 12, 4),
    (P.BLOCK_CAUSAL, 12, 12, 12),
    (P.BLOCK_CAUSAL, 4, 12, 4),
    (P.BLOCK_CAUSAL, 8, 16, 4),
    (P.BLOCK_DIFFUSION, 24, 24, 1),
    (P.BLOCK_DIFFUSION, 24, 24, 4),
    (P.BLOCK_DIFFUSION, 24, 24, 12),
    (P.BLOCK_DIFFUSION, 12, 24, 4),
    (P.BLOCK_DIFFUSION, 260, 260, 10),
]
# Every shape is compiled on its own, for seconds each.
FLEX_CASES = [(P.BLOCK_DIFFUSION, 260, 260, 10), (P.BLOCK_CAUSAL, 8, 16, 4)]
SLOW_FLEX_CASES = [case for case in CASES if case not in FLEX_CASES]
SLOW_FLEX_CASES += [
    (pattern, copies * n, copies * n, size)
    for pattern, copies in ((P.BLOCK_CAUSAL, 1), (P.BLOCK_DIFFUSION, 2))
    for n, size in ((130, 1), (130, 130), (192, 16), (256, 4))
]


def assert_equals_naive(case, backend: str) -> None:
    pattern, q_len, kv_len, block_size = case
    q, k, v = random_qkv(q_len=q_len, kv_len=kv_len)
    found = attend(q, k, v, pattern=pattern, block_size=block_size, backend=backend)
    mask = brute_force_mask(pattern, q_len=q_len, kv_len=kv_len, block_size=block_size)
    expected = naive_attention(q, k, v, mask=mask)
    assert found.dtype == q.dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.fixture
def fresh_compiler():
    """The compiler gives up on a function after eight shapes, whichever tests they came from."""
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sdpa_equals_naive(case):
    assert_equals_naive(case, "sdpa")


@pytest.mark.parametrize("case", FLEX_CASES, ids=str)
@torch.no_grad()
def test_flex_equals_naive(case, fresh_compiler):
    assert_equals_naive(case, "flex")


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_FLEX_CASES, ids=str)
@torch.no_grad()
def test_flex_equals_naive_everywhere(case, fresh_compiler):
    assert_equals_naive(case, "flex")


def test_flex_where_its_kernel_is_wrong(monkeypatch, caplog):
    """On a CPU with AVX2 alone likelihoods were off, or NaN, and nothing said why."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(attention, "_compiled_flex_attention", None)
    attention._cpu_computes_flex.cache_clear()
    for case in CASES:
        assert_equals_naive(case, "flex")
    assert caplog.text.count("FlexAttention is wrong on CPUs without AVX512") == 1
    attention._cpu_computes_flex.cache_clear()


@pytest.fixture
def traced_flex(monkeypatch, fresh_compiler):
    """FlexAttention compiled without Inductor: right on every CPU, and a graph takes no seconds."""
    monkeypatch.setattr(attention, "_cpu_computes_flex", lambda: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    attention._compiled_flex_attention.cache_clear()
    counters.clear()
    yield
    attention._compiled_flex_attention.cache_clear()


def assert_flex_of_rows_is_right(rows: int) -> None:
    q, k, v = (x[:1].repeat(rows, 1, 1, 1) for x in random_qkv(q_len=8, kv_len=8))
    found = attend(q, k, v, pattern=P.BLOCK_DIFFUSION, block_size=2, backend="flex")
    mask = brute_force_mask(P.BLOCK_DIFFUSION, q_len=8, kv_len=8, block_size=2)
    expected = naive_attention(q, k, v, mask=mask)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_flex_is_compiled_for_more_than_eight_shapes(traced_flex, caplog):
    """At the ninth every score was in memory, and nothing said so. Each shape is logged once."""
    caplog.set_level(logging.INFO, logger="models.attention")
    for rows in (*range(1, 10), 3):
        assert_flex_of_rows_is_right(rows)
    assert counters["stats"]["unique_graphs"] == 9
    said = [line for line in caplog.messages if "Compiling FlexAttention" in line]
    assert len(said) == 9
    assert said[2].endswith("for 3 rows, 8 queries, 8 keys and inference")


def test_flex_beyond_the_limit_is_sdpa(traced_flex, monkeypatch, caplog):
    """Shapes that are compiled stay so; the log says once what becomes of the others."""
    for module in (attention, compiling):
        monkeypatch.setattr(module, "MAX_GRAPHS", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (1, 2, 3, 4, 3, 1):
            assert_flex_of_rows_is_right(rows)
    assert counters["stats"]["unique_graphs"] == 2
    assert sum("compiled for 2 shapes, which is the limit" in m for m in caplog.messages) == 1


@pytest.mark.slow
def test_flex_in_a_larger_graph(traced_flex):
    """Whoever compiles the network compiles FlexAttention with it."""
    q, k, v = random_qkv(q_len=8, kv_len=8)
    call = functools.partial(attend, pattern=P.BLOCK_DIFFUSION, block_size=2, backend="flex")
    torch.testing.assert_close(torch.compile(call)(q, k, v), call(q, k, v))


def test_attention_of_another_pattern_differs():
    """The comparison above could tell a wrong mask from a right one."""
    q, k, v = random_qkv(q_len=24, kv_len=24)
    mask = brute_force_mask(P.BLOCK_DIFFUSION, q_len=24, kv_len=24, block_size=4)
    expected = naive_attention(q, k, v, mask=mask)
    for pattern, block_size in ((P.BLOCK_DIFFUSION, 6), (P.BLOCK_CAUSAL, 4), (P.FULL, 4)):
        found = attend(q, k, v, pattern=pattern, block_size=block_size, backend="sdpa")
        assert (found - expected).abs().max() > 0.1


def test_gradients_equal_naive():
    sizes = {"q_len": 24, "kv_len": 24}
    inputs = [x.requires_grad_() for x in random_qkv(**sizes)]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    weight = random_qkv(**sizes, seed=1)[0]
    out = attend(*inputs, pattern=P.BLOCK_DIFFUSION, block_size=4, backend="sdpa")
    (out * weight).sum().backward()
    mask = brute_force_mask(P.BLOCK_DIFFUSION, **sizes, block_size=4)
    (naive_attention(*twins, mask=mask) * weight).sum().backward()
    for found, expected in zip(inputs, twins, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-5)


def test_flex_refuses_to_train_on_the_cpu():
    """FlexAttention has no backward pass there; the message names the key and the way out."""
    q, k, v = random_qkv(q_len=8, kv_len=8)
    with pytest.raises(ValueError, match="model.attn_backend=flex.*CPU.*auto or sdpa"):
        attend(q.requires_grad_(), k, v, pattern=P.CAUSAL, block_size=4, backend="flex")


def test_unknown_backend_lists_the_known():
    q, k, v = random_qkv(q_len=8, kv_len=8)
    with pytest.raises(ValueError, match="attn_backend=xformers: .* auto, flash_attn, flex, sdpa"):
        attend(q, k, v, pattern=P.FULL, block_size=4, backend="xformers")


@pytest.mark.parametrize("backend", ["auto", "flash_attn"])
def test_default_backends_choose_by_device_and_pattern(backend):
    """The original's default, bd3lm with flash_attn, crashed: its kernels know no such mask."""
    for pattern in P:
        assert resolve_backend(backend, pattern=pattern, device=CPU) == "sdpa"
        on_gpu = "flex" if pattern is P.BLOCK_DIFFUSION else "sdpa"
        assert resolve_backend(backend, pattern=pattern, device=CUDA) == on_gpu


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_a_named_backend_is_kept(backend):
    for pattern in P:
        assert resolve_backend(backend, pattern=pattern, device=CPU) == backend
