"""The kernel of sampling in bf16 on a CPU, beside plain attention in float64 and the network."""

import shutil
from pathlib import Path

import pytest
import torch

from models import inference
from models.dit import split_heads
from models.inference import InferenceDIT
from models.kernels import cached_attention as module
from models.kernels.cached_attention import (
    MAX_NEW_TOKENS,
    cached_attention,
    can_attend_cached,
    kernel,
)
from models.kv_cache import KVCache
from models.masks import AttentionPattern
from models.rotary import Rotary, rotate
from tests.helpers.cached_passes import passes, ring
from tests.helpers.references import brute_force_mask, generator, small_dit

P = AttentionPattern

needs_kernel = pytest.mark.skipif(
    kernel(32) is None, reason="no C++ compiler, or a CPU without AVX512-BF16"
)


@pytest.fixture(autouse=True)
def two_threads():
    """The kernel divides its work, however many threads the tests are given."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_there_is_a_kernel_where_there_can_be():
    """A mistake in the kernel's text would go unnoticed: samplers do without."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "avx512_bf16" not in cpu.read_text() or shutil.which("g++") is None:
        pytest.skip("needs g++ and a CPU with AVX512-BF16")
    assert kernel(32) is not None and kernel(64) is not None and kernel(128) is not None


def plain(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, cos, sin, mask: torch.Tensor
) -> torch.Tensor:
    """Attention in float64 over bf16 keys and values in the order of the text."""
    q, k, v = split_heads(qkv, n_heads=keys.shape[1], cos=cos, sin=sin)
    keys = torch.cat((keys, k), dim=2).double()
    values = torch.cat((values, v), dim=2).double()
    scores = q.double() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ values).transpose(1, 2).flatten(2)


@needs_kernel
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("num_old", "num_new", "pattern", "block_size"),
    [
        (0, 4, P.BLOCK_CAUSAL, 4),  # nothing in the cache yet
        (48, 16, P.BLOCK_CAUSAL, 16),
        (48, 32, P.BLOCK_CAUSAL, 16),  # stores a block and fills the next: a mask
        (120, 16, P.BLOCK_CAUSAL, 4),  # new tokens on both sides of a block of 64 keys
        (63, 1, P.CAUSAL, 1),
        (64, 1, P.CAUSAL, 1),  # one key more than whole blocks
        (37, 29, P.CAUSAL, 1),
        (3, 17, P.FULL, 1),  # one query more than lanes
        (1000, 24, P.FULL, 1),
        (5, MAX_NEW_TOKENS, P.CAUSAL, 1),
    ],
)
@torch.no_grad()
def test_equals_plain_attention(num_old, num_new, pattern, block_size, head_dim):
    """Within the rounding of bf16, from scores of all sizes; also what is written."""
    g, num = generator(), num_old + num_new
    cache = KVCache(
        n_layers=2, batch_size=2, n_heads=3, capacity=num + 5, head_dim=head_dim,
        device=torch.device("cpu"), dtype=torch.bfloat16, moves=False,
    )  # fmt: skip
    cache._buffer.fill_(torch.nan)  # what nobody has written is not a number
    keys, values, _ = cache.reserve(1, num_new=num_old) if num_old else (None, None, None)
    old = torch.randn(2, 2, 3, num_old, head_dim, generator=g).bfloat16()
    if num_old:
        keys[:], values[:] = old
        cache.commit(num_old)
    spread = torch.tensor([0.3, 3.0])[:, None, None]  # weights nearly equal, and one far ahead
    qkv = (spread * torch.randn(2, num_new, 9 * head_dim, generator=g)).bfloat16()
    cos, sin = Rotary(head_dim)(torch.arange(num_old, num))
    keys, values, new = cache.reserve(1, num_new=num_new)
    found = cached_attention(
        qkv, keys=keys, values=values, new=new, cos=cos, sin=sin, pattern=pattern,
        block_size=block_size,
    )  # fmt: skip
    mask = brute_force_mask(pattern, q_len=num_new, kv_len=num, block_size=block_size)
    exact = plain(qkv, *old, cos=cos, sin=sin, mask=mask)
    for row in (0, 1):
        assert (found[row] - exact[row]).abs().max() < 0.01 * exact[row].abs().max()
    _, k, v = split_heads(qkv, n_heads=3, cos=cos, sin=sin)
    torch.testing.assert_close(keys[:, :, num_old:], k, rtol=0.01, atol=1e-5)
    assert torch.equal(values[:, :, num_old:], v)
    assert torch.equal(keys[:, :, :num_old], old[0]) and torch.equal(values[:, :, :num_old], old[1])
    assert cache._buffer[0].isnan().all()


@needs_kernel
@torch.no_grad()
def test_positions_of_each_row():
    """Rows may stand at different places of their texts."""
    cache = KVCache(
        n_layers=1, batch_size=2, n_heads=2, capacity=8, head_dim=32,
        device=torch.device("cpu"), dtype=torch.bfloat16, moves=False,
    )  # fmt: skip
    qkv = torch.randn(2, 4, 192, generator=generator()).bfloat16()
    cos, sin = Rotary(32)(torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]]))
    keys, values, new = cache.reserve(0, num_new=4)
    cached_attention(
        qkv, keys=keys, values=values, new=new, cos=cos, sin=sin, pattern=P.FULL, block_size=4
    )
    k = qkv.unflatten(-1, (3, 2, 32))[:, :, 1].transpose(1, 2)
    torch.testing.assert_close(keys, rotate(k, cos=cos, sin=sin), rtol=0.01, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize(
    ("pattern", "capacity"), [(P.BLOCK_CAUSAL, 16), (P.BLOCK_CAUSAL, 28), (P.CAUSAL, 28)]
)
@pytest.mark.parametrize("sizes", [{}, {"adaln": False}])
def test_cached_passes_are_as_near_to_float32(pattern, capacity, sizes, monkeypatch):
    """As those of products; also when the ring is full and new tokens are in its middle."""
    network = small_dit(block_size=4, hidden_size=64, **sizes)
    how = {"pattern": pattern, "capacity": capacity}
    exact = ring(InferenceDIT(network), **how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = InferenceDIT(network)
        found = ring(fast, **how)
        monkeypatch.setattr(inference, "can_attend_cached", lambda **_: False)
        without = ring(InferenceDIT(network), **how)
    assert not torch.equal(found, without)  # it was the kernel
    assert (found - exact).square().mean() < 1.2 * (without - exact).square().mean()


@needs_kernel
def test_long_passes_share_the_cache(monkeypatch):
    """A prompt goes through `attend`, and the kernel reads the keys that it left."""
    network = small_dit(block_size=4, hidden_size=64)
    exact = passes(network, pattern=P.BLOCK_CAUSAL)
    monkeypatch.setattr(inference, "MAX_NEW_TOKENS", 7)  # the first pass has 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = passes(InferenceDIT(network), pattern=P.BLOCK_CAUSAL, dtype=torch.bfloat16)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_other_machines_and_sizes():
    """Float32, GPUs and heads that do not fill registers go through `attend`."""
    cpu = torch.device("cpu")
    assert not can_attend_cached(head_dim=64, dtype=torch.float32, device=cpu)
    meta = torch.device("meta")
    assert not can_attend_cached(head_dim=64, dtype=torch.bfloat16, device=meta)
    assert not can_attend_cached(head_dim=48, dtype=torch.bfloat16, device=cpu)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", ""])
def test_without_a_working_compiler(compiler, monkeypatch, caplog):
    """Sampling goes on, slower, and the log says why."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level("INFO", logger=module.logger.name):
        assert kernel.__wrapped__(32) is None
    assert "sampling is slower" in caplog.text


def test_without_the_source(monkeypatch, tmp_path):
    """An exported model is Python alone, and compiles nothing on the reader's machine."""
    monkeypatch.setattr(module, "SOURCE", tmp_path / "cached_attention.cpp")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert kernel.__wrapped__(32) is None
