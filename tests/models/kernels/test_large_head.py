"""The output layer's form for GPUs beside that for CPUs: every chunk and every compiler."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losses import token_losses
from models.kernels import chunked_head, large_head
from models.kernels.chunked_head import MAX_LOGITS, target_scores
from models.kernels.large_head import PLAIN, Form, LargeTargetScores, compiled_form, form_for
from tests.helpers import small_module
from tests.helpers.references import generator
from tests.helpers.small_run import ALGOS
from tests.models.kernels.test_chunked_head import MASK, N, V, inputs


def form_of(backend: str | None) -> Form:
    return PLAIN if backend is None else compiled_form(backend)


def results(function, leaves, *, in_thread: bool = False) -> list[torch.Tensor]:
    """Both numbers, and gradients of different weights for each of them."""
    scores = torch.stack(tuple(function(*leaves)))
    upstream = torch.randn(2, N, generator=generator(3)).to(scores.dtype)
    found = []

    def differentiate():
        found.extend(torch.autograd.grad(scores, leaves, upstream))

    if in_thread:
        thread = threading.Thread(target=differentiate)
        thread.start()
        thread.join()
    else:
        differentiate()
    return [scores.detach(), *found]


def large(targets: torch.Tensor, *, chunk: int, backend: str | None = None):
    form = form_of(backend)
    return lambda *leaves: LargeTargetScores.apply(*leaves, targets, MASK, chunk, form)


@pytest.mark.parametrize(
    ("backend", "chunk", "in_thread"),
    [(None, chunk, False) for chunk in (4, 10, 23, 128)]
    + [("eager", 4, True), ("aot_eager", 10, True), ("aot_eager", 128, False)]
    + [pytest.param("inductor", 10, True, marks=pytest.mark.slow)],
)
def test_equals_the_form_for_cpus(backend, chunk, in_thread):
    """With a mask alone in its chunk, a last chunk that is filled up, and one chunk for all.

    On a GPU the backward pass runs in a thread of its own, and compiles there.
    """
    leaves, targets = inputs()
    expected = results(lambda *a: target_scores(*a, targets=targets, excluded=MASK), leaves)
    found = results(large(targets, chunk=chunk, backend=backend), leaves, in_thread=in_thread)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_bf16_is_as_near_to_float64_as_that_for_cpus(backend):
    """Logits are products in bf16, and their gradient is rounded to it; sums are in float32."""
    leaves, targets = inputs(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true = results(lambda *a: target_scores(*a, targets=targets, excluded=MASK), exact)
    cpu = results(lambda *a: target_scores(*a, targets=targets, excluded=MASK), leaves)
    found = results(large(targets, chunk=10, backend=backend), leaves)
    assert [t.dtype for t in found] == [t.dtype for t in cpu]
    for a, b, c in zip(found, cpu, true, strict=True):
        assert (a - c).norm() < 1.3 * (b - c).norm() + 1e-6


def test_a_compiler_that_fails_is_said_once_and_done_without(caplog):
    """A machine without a C compiler trains too."""

    def broken(*_args):
        raise RuntimeError("no C compiler\nat all")

    leaves, targets = inputs()
    functions = (large_head.add_to_sums, large_head.logits_gradient)
    form = Form(*(large_head._compiled(f, broken) for f in functions), 2**20)
    found = results(lambda *a: LargeTargetScores.apply(*a, targets, MASK, 10, form), leaves)
    expected = results(large(targets, chunk=10), leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert caplog.text.count("The output layer is not compiled") == 2, "both functions"


def test_too_little_memory_is_no_reason_to_go_on(monkeypatch):
    """The search for a batch size that fits is to hear of it."""

    def full(*_args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_settings: full)
    with pytest.raises(torch.OutOfMemoryError):
        large_head._compiled(large_head.add_to_sums, "inductor")()


def test_few_widths_for_any_number_of_rows():
    form = Form(None, None, 2**28)
    widths = {rows: form.chunk(rows, 50258) for rows in range(128, 70_000, 128)}
    assert set(widths.values()) == {50304, 25216, 12672, 6400, 3200}
    assert all(rows * width < 1.03 * 2**28 for rows, width in widths.items())
    assert {width % 128 for width in widths.values()} == {0}
    assert form.chunk(10**9, V) == 128


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def calls(function) -> int:
    """Operations of a forward and a backward pass, at batch 32 of 1,024 tokens, half masked."""
    like = {"device": "meta", "requires_grad": True}
    x = torch.empty(17408, 768, dtype=torch.bfloat16, **like)
    weight, bias = torch.empty(50258, 768, **like), torch.empty(50258, **like)
    targets = torch.empty(17408, dtype=torch.int64, device="meta")
    with Calls() as mode:
        scores = function(x, weight, bias, targets)
        torch.autograd.backward(scores, [torch.empty_like(score) for score in scores])
    return mode.number


def test_a_gpu_has_few_large_operations():
    """The chunks of a CPU's cache were 99 there, of dozens of small operations each.

    Compiled, what lies between the products are two kernels or three, which are not counted here.
    """
    chunk = max(512, MAX_LOGITS // 17408)
    small = calls(lambda *a: chunked_head.chunked_scores(*a, excluded=50257, chunk=chunk))
    fused = Form(lambda _l, _c, *sums: sums, lambda logits, *_a: (logits, logits[0]), 2**28)
    numbers = {"cpu": small}
    for name, form in (("plain", PLAIN), ("compiled", fused)):
        settings = (50257, form.chunk(17408, 50258), form)
        numbers[name] = calls(lambda *a, s=settings: LargeTargetScores.apply(*a, *s))
    assert numbers["plain"] < numbers["cpu"] / 5 and numbers["compiled"] < numbers["cpu"] / 15


def test_what_suits_a_device():
    assert form_for(torch.device("cpu"), is_compiled=True) is None
    assert form_for(torch.device("cuda", 1), is_compiled=False) is PLAIN
    compiled = form_for(torch.device("cuda"), is_compiled=True)
    assert compiled is compiled_form() and compiled.max_logits > PLAIN.max_logits


@pytest.mark.parametrize("algo", ["bd3lm", "sedd"])
def test_a_training_in_the_form_of_a_gpu_is_the_same(compose, tmp_path, monkeypatch, algo):
    """Room for a fixed number of masks, and large chunks: two steps with the loss of a CPU."""
    losses, asked = [], []

    def form(_device, *, is_compiled):
        asked.append(is_compiled)
        return PLAIN

    for is_gpu in (False, True):
        if is_gpu:
            monkeypatch.setattr(token_losses, "shapes_are_fixed", lambda _device: True)
            monkeypatch.setattr(chunked_head, "form_for", form)
        model = small_module.module(compose, tmp_path, *ALGOS[algo])
        trainer, memory = small_module.trainer(tmp_path, steps=2)
        trainer.fit(model, small_module.batches(2), small_module.batches(1, seed=1))
        losses.append(memory.values("trainer/loss") + memory.values("val/nll"))
    assert asked and len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
