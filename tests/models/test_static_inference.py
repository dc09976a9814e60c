"""Passes of fixed shapes beside passes over a cache that grows."""

import contextlib
import gc
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import kv_cache, static_inference
from models.inference import InferenceDIT
from models.masks import AttentionPattern
from models.static_inference import PIECES, StaticInferenceDIT
from tests.helpers.cached_passes import ring
from tests.helpers.references import random_tokens, small_dit

P = AttentionPattern


@pytest.fixture
def traced(monkeypatch):
    """Compiles without Inductor, which takes its time: what it would be given counts here."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    pieces = tuple(torch.compile(p, backend=keep, dynamic=False, fullgraph=True) for p in PIECES)
    torch._dynamo.reset()
    monkeypatch.setattr(static_inference, "compiled_pieces", lambda: pieces)
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("pattern", "capacity"), [(P.BLOCK_CAUSAL, 16), (P.BLOCK_CAUSAL, 28), (P.CAUSAL, 28)]
)
@pytest.mark.parametrize("slots", [4, 8, 128])
def test_static_passes_equal_the_growing_cache(pattern, capacity, slots, monkeypatch):
    """Queries see a multiple of some slots, mostly under a mask; also when the ring is full."""
    monkeypatch.setattr(kv_cache, "SLOTS", slots)
    network = InferenceDIT(small_dit(block_size=4))
    static = StaticInferenceDIT(network, compiles=False)
    expected = ring(network, pattern=pattern, capacity=capacity)
    for _ in range(2):
        found = ring(static, pattern=pattern, capacity=capacity)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_passes_equal_the_growing_cache():
    """Two numbers of tokens and three of logits; the second cache compiles what was left over."""
    network = InferenceDIT(small_dit(block_size=4))
    static = StaticInferenceDIT(network)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = [ring(static, pattern=P.BLOCK_CAUSAL) for _ in range(3)]
    expected = ring(network, pattern=P.BLOCK_CAUSAL)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_layers_and_lengths_share_what_is_compiled(traced):
    """A pass as a whole was compiled anew for each shape, which took 16 to 49 seconds."""
    static = StaticInferenceDIT(InferenceDIT(small_dit(block_size=4, n_blocks=3)))
    cache = static.make_cache(2, capacity=256)
    at = torch.tensor([1, 7])  # of row 0 the second token, of row 1 the last
    for start in range(0, 256, 4):
        for _ in range(2):
            block = random_tokens(2, 256)[:, start : start + 4]
            static(block, pattern=P.BLOCK_CAUSAL, kv_cache=cache, logits_at=at)
        cache.commit(4)
    assert len(static._passes) == 2 + 2, "of 128 slots each, with and without a mask"
    # The projection, the rest of a layer for all tokens and for those of the logits, the head.
    assert len(traced) == 4


class Largest(TorchDispatchMode):
    """The most numbers that an operation's result takes of new memory."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in old:
                self.size = max(self.size, x.numel())
        return result


def test_no_pass_copies_the_cache(traced):
    """A compiled pass copied keys and values of all layers, once for each of them."""
    tokens = random_tokens(2, 4)
    for compiles in (False, True):
        static = StaticInferenceDIT(InferenceDIT(small_dit(block_size=4)), compiles=compiles)
        cache, largest = static.make_cache(2, capacity=4096), Largest()
        for _ in range(2):
            with contextlib.nullcontext() if compiles else largest:
                static(tokens, pattern=P.BLOCK_CAUSAL, kv_cache=cache)
        assert compiles or 0 < largest.size < cache.layers[0][0].numel() / 8
    nodes = [node for graph in traced for node in graph.graph.nodes]
    values = [node.meta.get("example_value") for node in nodes]
    shapes = [tuple(x.shape) for x in values if isinstance(x, torch.Tensor)]
    assert shapes and not any(4096 in shape for shape in shapes), "compiled parts see no cache"


def warnings_of(caplog) -> list[str]:
    return [r.message for r in caplog.records if r.name == static_inference.__name__]


@pytest.mark.slow
def test_batches_of_many_sizes(traced, caplog):
    """The fifth batch size ended the run: FailOnRecompileLimitHit."""
    network = InferenceDIT(small_dit(block_size=4))
    static = StaticInferenceDIT(network)
    for batch_size in (8, 3, 1, 2, 5):
        tokens = random_tokens(batch_size, 8)
        logits = []
        for one in (network, static):
            cache = one.make_cache(batch_size, capacity=16)
            passes = [one(tokens, pattern=P.BLOCK_CAUSAL, kv_cache=cache) for _ in range(3)]
            cache.commit(4)
            passes += [one(tokens[:, 4:], pattern=P.BLOCK_CAUSAL, kv_cache=cache)] * 3
            logits.append(passes)
            del cache
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert not warnings_of(caplog)


def test_beyond_the_limit_passes_are_not_compiled(traced, caplog, monkeypatch):
    """What is compiled stays so; the log says it once."""
    monkeypatch.setattr(static_inference, "allow_graphs", lambda: None)
    network = InferenceDIT(small_dit(block_size=4))
    static = StaticInferenceDIT(network)

    def passes(batch_size):
        cache = static.make_cache(batch_size, capacity=8)
        tokens = random_tokens(batch_size, 4)
        for _ in range(2):
            found = static(tokens, pattern=P.BLOCK_CAUSAL, kv_cache=cache)
        expected = network(
            tokens, pattern=P.BLOCK_CAUSAL, kv_cache=network.make_cache(batch_size, capacity=8)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    with torch._dynamo.config.patch(recompile_limit=2):
        for batch_size in (1, 2, 3, 4, 1):
            passes(batch_size)
    assert [text.split(":")[0] for text in warnings_of(caplog)] == ["sampling.compile=true"]
    with torch.compiler.set_stance("fail_on_recompile"):
        passes(1)


def test_static_cache_keeps_its_addresses():
    """Recorded passes read the tensors where they were; the next batch takes them over."""
    static = StaticInferenceDIT(InferenceDIT(small_dit(block_size=4)), compiles=False)

    def addresses(cache):
        return [x.data_ptr() for layer in cache.layers for x in layer]

    cache = static.make_cache(2, capacity=16)
    before = addresses(cache)
    for start in (0, 4, 8):
        static(random_tokens(2, 12)[:, start : start + 4], pattern=P.BLOCK_CAUSAL, kv_cache=cache)
        cache.commit(4)
    cache.select_rows(torch.tensor([1, 1]))
    assert all(torch.equal(*x) for layer in cache.layers for x in layer)
    assert addresses(cache) == before
    assert addresses(static.make_cache(2, capacity=16)) != before, "the first one is still there"
    static(random_tokens(2, 4), pattern=P.BLOCK_CAUSAL, kv_cache=cache)
    assert len(static._passes) == 2, "with a mask, and where every slot is seen without one"
    del cache
    gc.collect()
    assert addresses(static.make_cache(2, capacity=16)) == before and len(static._passes) == 2
    assert static.make_cache(2, capacity=8).layers[0][0].shape[2] == 8


class FakeCuda:
    """Notes what happens on which device; graphs that are replayed run what was recorded."""

    def __init__(self):
        self.current, self.recorded, self.replayed = 0, [], []

    def install(self, monkeypatch):
        cuda = self

        @contextlib.contextmanager
        def on_device(device):
            cuda.current, before = device.index, cuda.current
            yield
            cuda.current = before

        class Stream:
            def __init__(self):
                self.device = cuda.current

            def wait_stream(self, other):
                assert self.device == other.device

        class Graph:
            def replay(self):
                cuda.replayed.append(cuda.current)

        @contextlib.contextmanager
        def record(graph, *, stream):
            assert stream.device == cuda.current
            cuda.recorded.append(cuda.current)
            yield

        monkeypatch.setattr(torch.cuda, "device", on_device)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)


def test_passes_are_recorded_where_their_tensors_are(monkeypatch):
    """They were recorded on the process's current GPU, which torchrun does not choose."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    at, runs, place = torch.zeros(1), [], mock.MagicMock()
    inputs = (place, place, place)
    one = static_inference.StaticPass(run=lambda *_: runs.append(cuda.current), inputs=inputs)
    for _ in range(3):
        one(mock.Mock(device=torch.device("cuda", 2)), at, start=0)
    assert runs == [2, 2, 2] and cuda.recorded == [2] and cuda.replayed == [2, 2, 2]
    assert cuda.current == 0
