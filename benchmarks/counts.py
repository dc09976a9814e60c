"""Counts of a training step that need no GPU: graphs, recompilations, waits, operations, memory.

    python -m benchmarks.counts --json counts.json

The step of `benchmarks.train_step` in bf16 on a CPU, in its form for GPUs. What it computes is left
out: products give zeros, and so does a stand-in for FlexAttention, which keeps for the backward
pass what that keeps (queries, keys, values, output and a number per query), with one operation
forward and three backward. So the figures take seconds, and do not depend on the machine.
Operations are counted without a compiler; the layers' own shrink to a few kernels each with it.
Bytes kept are those that a row more costs, likewise: a compiler keeps less.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.comparison import ALGOS, read_options
from benchmarks.machine import description, write_json
from benchmarks.operations import Operations
from benchmarks.roofline import computed_pairs
from benchmarks.sampling import MODELS
from benchmarks.steps import Job, make_config, make_model, make_step
from models.kernels.large_head import PLAIN
from models.masks import AttentionPattern

# The numbers of graphs do not depend on sizes.
SMALLEST = ("model.hidden_size=32", "model.n_heads=2", "model.n_blocks=2", "model.cond_dim=16")
TILES, BLOCK_SIZES = (64, 128), (16, 4)


class WithoutProducts(TorchDispatchMode):
    """Zeros for the result of every matrix product."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            a, b = args
            return a.new_zeros((*a.shape[:-1], b.shape[-1]))
        if name == "addmm":
            bias, a, b = args
            return a.new_zeros((len(a), b.shape[-1]))
        return function(*args, **(kwargs or {}))


class _StandIn(torch.autograd.Function):
    """What FlexAttention keeps, and none of its arithmetic."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors[:3])


def _attend(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    return _StandIn.apply(q, k, v)


def without_attention() -> Any:
    """A context in which networks attend to nothing."""
    return mock.patch("models.dit.attend", _attend)


def as_on_a_gpu() -> contextlib.ExitStack:
    """A context in which masks have a fixed room and the head has large chunks, as on a GPU."""
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch("losses.token_losses.shapes_are_fixed", lambda _device: True))
    form = mock.patch("models.kernels.chunked_head.form_for", lambda *_, **__: PLAIN)
    stack.enter_context(form)
    return stack


def count_operations(job: Job) -> tuple[Operations, float]:
    """Operations and waits of a whole step, the second one, and MB kept by its forward pass."""
    config = make_config(job)
    model = make_model(job, config)
    step = make_step(job, config, model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, held until the end so that none is used again

    def keep(x: Tensor) -> Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = x.detach()
        return x

    with as_on_a_gpu(), without_attention(), WithoutProducts():
        step.run()
        torch.manual_seed(0)
        with Operations() as operations:
            step.run()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            step.run()
    return operations, sum(x.untyped_storage().nbytes() for x in kept.values()) / 1e6


def count_graphs(job: Job) -> dict[str, int]:
    """Graphs that are compiled anew in each phase of a run; nothing is made of them."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    shrunk = vars(job) | {"overrides": SMALLEST, "compiled": "true", "precision": "float32"}
    shrunk["batch_size"] = 2
    config = make_config(Job(**shrunk))
    model = make_model(job, config)
    model.losses = replace(model.losses, min_rows=2)  # as `Diffusion.configure_model` does
    torch._dynamo.reset()
    found = {}
    phases = {
        "first step": ("train", {}), "later steps": ("train", {}), "validation": ("eval", {}),
        "a smaller last batch": ("eval", {"batch_size": 1}), "training again": ("train", {}),
        "validation again": ("eval", {}),
    }  # fmt: skip
    compiled = functools.partial(torch.compile, backend=count)
    with mock.patch("torch.compile", compiled), without_attention():
        for name, (work, changes) in phases.items():
            before = graphs
            step = make_step(Job(**shrunk | {"work": work} | changes), config, model)
            for _ in range(2 if name == "later steps" else 1):
                step.run()
            found[name] = graphs - before
    torch._dynamo.reset()
    return found


def count_tiles(length: int) -> dict[str, float]:
    """Share of the computed area of attention that is visible, of full layers."""
    found = {}
    for block_size in BLOCK_SIZES:
        visible = length**2 + length * block_size
        for tile in TILES:
            computed = computed_pairs(
                AttentionPattern.BLOCK_DIFFUSION, q_len=2 * length, kv_len=2 * length,
                block_size=block_size, tile=tile,
            )  # fmt: skip
            found[f"L = {block_size}, tiles of {tile}"] = visible / computed
    return found


def count(arguments: argparse.Namespace) -> dict:
    """All figures of the command."""
    job = Job(
        work="train", side="ours", algo=arguments.algo, model=arguments.model,
        length=arguments.length, block_size=arguments.block_size, precision="bf16",
        compiled="false", batch_size=1, overrides=tuple(arguments.overrides),
    )  # fmt: skip
    operations, kept = count_operations(job)
    _, kept_of_two = count_operations(Job(**vars(job) | {"batch_size": 2}))
    return {
        "graphs": count_graphs(job),
        "waits": dict(operations.waits),
        "operations": operations.computed.total(),
        "operations_by_name": dict(operations.computed.most_common()),
        "kept_mb_per_row": kept_of_two - kept,
        "visible": count_tiles(arguments.length) if arguments.algo == "bd3lm" else {},
    }


def print_counts(found: dict, where: dict, *, title: str) -> None:
    """One table of all."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("per training step", min_width=50)
    table.add_column("count", justify="right", min_width=20)
    for phase, number in found["graphs"].items():
        table.add_row(f"graphs compiled: {phase}", str(number))
    waits = ", ".join(f"{n} {name}" for name, n in found["waits"].items())
    table.add_row("waits for the device", waits or "0")
    table.add_row("operations, not compiled", f"{found['operations']:,}")
    most = list(found["operations_by_name"].items())[:6]
    table.add_row("  of which", ", ".join(f"{n} {name}" for name, n in most))
    table.add_row("kept for the backward pass, of a row", f"{found['kept_mb_per_row']:,.0f} MB")
    for what, share in found["visible"].items():
        table.add_row(f"computed area of attention that is visible: {what}", f"{share:.0%}")
    Console(width=110).print(table)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--algo", choices=ALGOS, default="bd3lm")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--block-size", type=int, help="of bd3lm (default 16)")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return read_options(parser, words)


def main(words: Sequence[str] | None = None) -> None:
    """Count, print the table and write JSON where wanted."""
    arguments = options(words)
    where = description(torch.device("cpu"))
    found = count(arguments)
    blocks = f", L = {arguments.block_size}" if arguments.algo == "bd3lm" else ""
    title = f"{arguments.algo}, {arguments.model}, N = {arguments.length}{blocks}, bf16"
    print_counts(found, where, title=title)
    if arguments.json is not None:
        write_json(arguments.json, where | {"title": title} | found)


if __name__ == "__main__":
    sys.exit(main())
