"""The output layer and its loss, in the forms there are, side by side.

    python -m benchmarks.head --json benchmarks/results/DATE-DEVICE/head.json

What is timed is the mean of -log p of given tokens and its gradients, of bf16 inputs and float32
weights: at `small` and batch 32 of 1,024 tokens there are 17,408 places for masks
(`losses.capacity`). Errors are those of 1,024 positions against float64. "Liger" and "CCE" are
Liger-kernel's fused linear cross-entropy and cut-cross-entropy, where they are installed; they do
without weights per position here, which the training needs. On a CPU sizes are tiny by default, and
what needs a GPU is left out.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.comparison import WIDTH, write_json
from benchmarks.flops import matmul_peak
from benchmarks.machine import description, peak_memory_mb, start_memory_measurement
from models.kernels.chunked_head import MAX_LOGITS, NEG_INFINITY, chunked_scores
from models.kernels.large_head import PLAIN, Form, LargeTargetScores, compiled_form

# Inputs (n, D), weights (V, D), biases (V,) and tokens (n,) -> the mean of -log p.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_ERROR_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of the table."""

    name: str
    seconds: float  # of a forward and a backward pass, the median
    share_of_peak: float  # three matrix products, at the rate of the machine's best one
    memory_mb: float  # the most beside inputs and weights
    loss_error: float  # relative, against float64, as are the gradients' by their norm
    x_error: float
    weight_error: float


def all_at_once(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """All logits in memory."""
    logits = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets)


def chunked(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """As on a CPU."""
    chunk = max(512, MAX_LOGITS // len(x))
    return -chunked_scores(x, weight, bias, targets, excluded=-1, chunk=chunk).log_p.mean()


def large(form: Form) -> Loss:
    """As on a GPU."""

    def loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        chunk = form.chunk(len(x), len(weight))
        target, log_sum = LargeTargetScores.apply(x, weight, bias, targets, -1, chunk, form)
        return (log_sum - target).mean()

    return loss


def liger() -> Loss:
    """Liger-kernel's."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, bias, targets: function(
        weight.to(x.dtype), x, targets, bias.to(x.dtype)
    )


def cut_cross_entropy() -> Loss:
    """Apple's. It has no bias in every version, so here that is a column of the weights."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        x = F.pad(x, (0, 1), value=1.0)
        weight = torch.cat((weight, bias[:, None]), dim=1).to(x.dtype)
        x, weight = (F.pad(part, (0, -part.shape[1] % 16)) for part in (x, weight))
        return linear_cross_entropy(x, weight, targets, reduction="mean")

    return loss


# What makes each form, and whether it needs a GPU.
VARIANTS: dict[str, tuple[Callable[[], Loss], bool]] = {
    "all at once": (lambda: all_at_once, False),
    "a CPU's chunks": (lambda: chunked, False),
    "large chunks": (lambda: large(PLAIN), False),
    "large chunks, compiled": (lambda: large(compiled_form()), True),
    "Liger": (liger, True),
    "CCE": (cut_cross_entropy, True),
}


def made_inputs(rows: int, arguments: argparse.Namespace) -> list[Tensor]:
    """Normal inputs, weights that make logits of deviation 4.6, and random tokens.

    The last token is the mask: its bias keeps it out.
    """
    generator = torch.Generator(arguments.device).manual_seed(0)
    like = {"device": arguments.device, "generator": generator}
    dim, vocab_size = arguments.hidden_size, arguments.vocab_size
    x = torch.randn(rows, dim, **like).to(getattr(torch, arguments.dtype))
    weight = torch.randn(vocab_size, dim, **like) * (4.6 / dim**0.5)
    bias = torch.randn(vocab_size, **like)
    bias[-1].fill_(NEG_INFINITY)
    targets = torch.randint(vocab_size - 1, (rows,), **like)
    return [*(leaf.requires_grad_() for leaf in (x, weight, bias)), targets]


def step(loss: Loss, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The loss and its gradients."""
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs[:3])]


def errors(loss: Loss, inputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of loss and gradients, as shares of their norm."""
    found = step(loss, inputs)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def seconds_of(loss: Loss, inputs: Sequence[Tensor], *, limit: float) -> list[float]:
    """Of each step after a first one; at least three, and as many as fit into the limit."""
    device, seconds, began = inputs[0].device, [], time.perf_counter()
    step(loss, inputs)
    while len(seconds) < 3 or (len(seconds) < 50 and time.perf_counter() - began < limit):
        _synchronize(device)
        start = time.perf_counter()
        step(loss, inputs)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    name: str, loss: Loss, inputs: Sequence[Tensor], *, few: Sequence[Tensor],
    exact: Sequence[Tensor], peak: float, limit: float,
) -> Figures:  # fmt: skip
    """One row; `few` are the inputs of which `exact` are the results in float64."""
    # At full size first: what is compiled is compiled for the sizes that come first.
    seconds = sorted(seconds_of(loss, inputs, limit=limit))
    before = start_memory_measurement(inputs[0].device)
    step(loss, inputs)
    _synchronize(inputs[0].device)
    memory = peak_memory_mb(inputs[0].device) - before
    of_loss, of_x, of_weight, _ = errors(loss, few, exact)
    median = seconds[len(seconds) // 2]
    return Figures(
        name=name,
        seconds=median,
        share_of_peak=6 * len(inputs[0]) * inputs[1].numel() / median / peak,
        memory_mb=memory,
        loss_error=of_loss,
        x_error=of_x,
        weight_error=of_weight,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; sizes are those of `small` on a GPU, tiny on a CPU."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    known, _ = parser.parse_known_args(words)
    rows, vocab_size, dim = (17408, 50258, 768) if known.device != "cpu" else (256, 1000, 64)
    parser.add_argument("--rows", type=int, default=rows, help=f"positions ({rows})")
    parser.add_argument("--vocab-size", type=int, default=vocab_size)
    parser.add_argument("--hidden-size", type=int, default=dim)
    dtype = "bfloat16" if known.device != "cpu" else "float32"
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each variant (2)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Time the forms, print the table, and write JSON where wanted (after each row anew)."""
    arguments = options(words)
    device = torch.device(arguments.device)
    title = (
        f"output layer and loss: {arguments.rows:,} positions, {arguments.hidden_size} x "
        f"{arguments.vocab_size:,}, {arguments.dtype}"
    )
    where, rows, left_out = description(device), [], {}
    inputs = made_inputs(arguments.rows, arguments)
    few = made_inputs(min(_ERROR_ROWS, arguments.rows), arguments)
    doubles = [leaf.detach().double().requires_grad_() for leaf in few[:3]]
    exact = step(all_at_once, [*doubles, few[3]])
    peak = matmul_peak(device, inputs[0].dtype)
    for name in arguments.variants:
        make, needs_gpu = VARIANTS[name]
        try:
            if needs_gpu and device.type != "cuda":
                raise RuntimeError("needs a GPU")
            row = measure(
                name, make(), inputs, few=few, exact=exact, peak=peak, limit=arguments.seconds
            )
        except Exception as error:  # not installed, another signature, too little memory
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0]
            print(f"{name} is left out ({left_out[name]})")
        else:
            rows.append(row)
        if arguments.json is not None:
            full = {"title": title, "rows": [asdict(row) for row in rows], "left_out": left_out}
            write_json(arguments.json, where | full)
    print_figures(rows, where, title=title)


def print_figures(rows: list[Figures], where: dict, *, title: str) -> None:
    """The table of a run."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("ms", "of peak", "MB", "error:\nloss", "gradient\nof x", "gradient\nof W"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{1000 * row.seconds:,.2f}",
            f"{row.share_of_peak:.0%}",
            f"{row.memory_mb:,.0f}",
            *(f"{error:.1e}" for error in (row.loss_error, row.x_error, row.weight_error)),
        )
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    main()
