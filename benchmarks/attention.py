"""FlexAttention's variants beside SDPA, for the mask of block diffusion, forward and backward.

    python -m benchmarks.attention --batch-size 16 --json attention.json

Queries, keys and values of [x_t ; x_0], 2N of each. `flex` is one call; "tiles" is its block mask's
BLOCK_SIZE, beside it the kernel's options. `two calls` computes each noisy block's attention to
itself by plain products and everything to clean keys by FlexAttention, whose masks have no gaps
then, and merges them by their log-sum-exp. `sdpa` is the dense mask. Errors are relative, against
float64, of one head of one row. A variant that fails is named, and the others are timed all the
same. On a CPU FlexAttention is not compiled, and forward alone.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from benchmarks.machine import description, write_json
from models.masks import AttentionPattern, dense_mask, may_attend

P = AttentionPattern.BLOCK_DIFFUSION
BLOCK_SIZES = (16, 4)
SQUARE = {"BLOCK_M": 64, "BLOCK_N": 64}
OPTIONS = {  # of FlexAttention's kernels
    "default": {},
    "64 x 64, 4 warps, 3 stages": {**SQUARE, "num_warps": 4, "num_stages": 3},
    "128 x 64, 8 warps, 3 stages": {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
    },
    "64 x 128, 4 warps, 2 stages": {
        "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 128, "fwd_num_warps": 4, "fwd_num_stages": 2,
    },
}  # fmt: skip
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way: `make` is given L, N and the device."""

    name: str
    make: Callable[[int, int, torch.device], Attend]


@dataclass(kw_only=True)
class Row:
    """What came out; errors of the output and of the worst gradient."""

    name: str
    block_size: int
    seconds: float | None = None  # forward and backward; on a CPU forward
    forward_seconds: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    failed: str | None = None


def flex(tiles: int, options: dict) -> Callable[[int, int, torch.device], Attend]:
    """One call of FlexAttention."""

    def make(block_size: int, length: int, device: torch.device) -> Attend:
        def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return may_attend(q, k, pattern=P, length=length, block_size=block_size)

        mask = _mask(sees, 2 * length, 2 * length, tiles=tiles, device=device)
        call = _flex(device)
        return lambda q, k, v: call(q, k, v, block_mask=mask, kernel_options=options or None)

    return make


def two_calls(tiles: int) -> Callable[[int, int, torch.device], Attend]:
    """Own noisy blocks by products, clean keys by FlexAttention, merged by log-sum-exp."""

    def make(block_size: int, length: int, device: torch.device) -> Attend:
        def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            is_clean = (q >= length).int()  # it sees its own block, too
            return q % length // block_size + is_clean > k // block_size

        mask = _mask(sees, 2 * length, length, tiles=tiles, device=device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            clean_k, clean_v = k[:, :, length:], v[:, :, length:]
            out, more = flex_attention(
                q, clean_k, clean_v, block_mask=mask, return_aux=AuxRequest(lse=True)
            )
            own, own_log_sum = own_blocks(
                *(x[:, :, :length] for x in (q, k, v)), block_size=block_size
            )
            # The first block sees nothing clean: its log-sum is minus infinity, its share 0.
            share = torch.sigmoid(own_log_sum - more.lse[:, :, :length])[..., None]
            noisy = out[:, :, :length]
            noisy = torch.where(share == 1, own, share * own + (1 - share) * noisy)
            return torch.cat((noisy.to(out.dtype), out[:, :, length:]), dim=2)

        return attend if device.type == "cpu" else torch.compile(attend, dynamic=False)

    return make


def own_blocks(q: Tensor, k: Tensor, v: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Attention of each block to itself, (B, H, N, d), and its log-sum-exp (B, H, N) float32."""
    q, k, v = (x.unflatten(2, (-1, block_size)) for x in (q, k, v))  # (B, H, K, L, d)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    log_sum = scores.logsumexp(dim=-1)
    weights = (scores - log_sum[..., None]).exp()
    return (weights.to(v.dtype) @ v).flatten(2, 3), log_sum.flatten(2, 3)


def sdpa(block_size: int, length: int, device: torch.device) -> Attend:
    """PyTorch's own attention under a dense mask."""
    mask = dense_mask(
        P, q_len=2 * length, kv_len=2 * length, block_size=block_size, device=device
    )
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _mask(
    sees: Callable, q_len: int, kv_len: int, *, tiles: int, device: torch.device
) -> BlockMask:
    return create_block_mask(sees, None, None, q_len, kv_len, device=device, BLOCK_SIZE=tiles)


def _flex(device: torch.device) -> Callable:
    return flex_attention if device.type == "cpu" else torch.compile(flex_attention, dynamic=False)


# The most telling ones first: time may run out.
VARIANTS = [
    Variant(name="flex, tiles 128", make=flex(128, {})),
    Variant(name="flex, tiles 64", make=flex(64, SQUARE)),
    Variant(name="two calls, tiles 128", make=two_calls(128)),
    Variant(name="sdpa", make=sdpa),
    *(Variant(name=f"flex, tiles 128, {name}", make=flex(128, options))
      for name, options in OPTIONS.items() if options),
]  # fmt: skip


def inputs(arguments: argparse.Namespace) -> list[Tensor]:
    """q, k, v and the gradient of the output, (B, H, 2N, d)."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, arguments.heads, 2 * arguments.length, arguments.head_dim)
    dtype = torch.float32 if arguments.device.type == "cpu" else torch.bfloat16
    return [torch.randn(shape, generator=generator).to(arguments.device, dtype) for _ in range(4)]


def exact(tensors: Sequence[Tensor], *, length: int, block_size: int) -> list[Tensor]:
    """Output and gradients of the first head of the first row, in float64."""
    q, k, v, grad = (x[0, 0].double() for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = dense_mask(
        P, q_len=2 * length, kv_len=2 * length, block_size=block_size, device=q.device
    )
    scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    out = scores.softmax(dim=-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def relative(found: Tensor, expected: Tensor) -> float:
    """Of the first head of the first row."""
    return ((found[0, 0].double() - expected).norm() / expected.norm()).item()


def seconds_of(run: Callable[[], object], device: torch.device, *, times: int) -> float:
    """The median of several runs."""
    taken = []
    for _ in range(times):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    variant: Variant, tensors: Sequence[Tensor], arguments: argparse.Namespace, *, block_size: int
) -> Row:
    """Time one variant, and compare it."""
    device, length = arguments.device, arguments.length
    row, trains = Row(name=variant.name, block_size=block_size), device.type != "cpu"
    torch._dynamo.reset()
    attend = variant.make(block_size, length, device)
    *qkv, grad = tensors
    qkv = [x.detach().requires_grad_(trains) for x in qkv]
    expected = exact(tensors, length=length, block_size=block_size)

    def step() -> tuple[Tensor, ...]:
        out = attend(*qkv)
        return (out, *torch.autograd.grad(out, qkv, grad)) if trains else (out,)

    errors = [relative(*pair) for pair in zip(step(), expected, strict=False)]
    row.error, row.gradient_error = errors[0], max(errors[1:], default=None)
    times = arguments.times
    seconds_of(step, device, times=1)
    row.seconds = seconds_of(step, device, times=times)
    with torch.no_grad():
        attend(*qkv)  # without gradients it is compiled anew
        row.forward_seconds = seconds_of(lambda: attend(*qkv), device, times=times)
    return row


def rows_of(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yields a row per variant and block size, in time."""
    began, tensors = time.perf_counter(), inputs(arguments)
    for variant in VARIANTS:
        for block_size in arguments.block_sizes:
            row = Row(name=variant.name, block_size=block_size)
            if time.perf_counter() - began > arguments.max_seconds:
                row.failed = "out of time"
                yield row
                continue
            try:
                row = measure(variant, tensors, arguments, block_size=block_size)
            except Exception as error:  # a compiler's are of any kind
                row.failed = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            yield row


def print_rows(rows: list[Row], where: dict, *, title: str) -> None:
    """The table of a run."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for heading in ("variant", "L", "ms", "forward ms", "error", "of gradients"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        times = [None if x is None else 1e3 * x for x in (row.seconds, row.forward_seconds)]
        figures = [*times, row.error, row.gradient_error]
        cells = ["" if x is None else f"{x:.3g}" for x in figures]
        name = row.name if row.failed is None else f"{row.name}: {row.failed}"
        table.add_row(name, str(row.block_size), *cells)
    Console(width=110).print(table)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=list(BLOCK_SIZES))
    parser.add_argument("--times", type=int, default=10, help="runs that are timed")
    parser.add_argument("--max-seconds", type=float, default=40, help="then the rest is left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a size for any machine")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(words)
    if arguments.tiny:
        sizes = {"batch_size": 1, "heads": 1, "head_dim": 16, "length": 64, "times": 1}
        vars(arguments).update(sizes)
    for size in arguments.block_sizes:
        if arguments.length % size:
            parser.error(f"--length {arguments.length} is no multiple of block size {size}")
    arguments.device = torch.device(arguments.device)
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Time the variants, print the table and write JSON where wanted."""
    arguments = options(words)
    where = description(arguments.device)
    passes = "forward" if arguments.device.type == "cpu" else "forward and backward"
    title = (
        f"attention of block diffusion, {passes}: batch {arguments.batch_size}, "
        f"{arguments.heads} heads of {arguments.head_dim}, N = {arguments.length}"
    )
    rows = []
    for row in rows_of(arguments):
        rows.append(row)
        print(f"{row.name}, L = {row.block_size}: {row.failed or 'done'}", file=sys.stderr)
        if arguments.json is not None:
            record = {"title": title, "rows": [asdict(row) for row in rows]}
            write_json(arguments.json, where | record)
    print_rows(rows, where, title=title)
    if all(row.failed for row in rows):
        sys.exit("no variant worked")


if __name__ == "__main__":
    main()
