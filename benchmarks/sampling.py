"""How fast bd3lm samples: with the KV cache, beside recomputing the window in every step.

    python -m benchmarks.sampling --batch-size 1 16 --json sampling.json
    python -m benchmarks.sampling --compile false graphs true --texts --precision float32

Random weights, first-hitting, nucleus 0.9. Both figures of a row come from the same run. The
recomputing sampler is timed on four passes in each of three blocks, at the start, the middle and
the end of the text, because a whole text would take minutes per row; its figure is their mean.
With `--texts` nothing is timed: the texts of the same seeds are compared, row by row, with those of
the first way of `--compile`.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import (
    description,
    peak_memory_mb,
    start_memory_measurement,
    write_json,
)
from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.inference import cast_matrices
from models.kernels.packed_linear import PackedLinear
from models.masks import AttentionPattern
from sampling.base import blank_canvas
from sampling.decoding import Decoding
from sampling.semi_ar import SemiAutoregressiveSampler
from utils import keep_freed_memory, keep_freed_memory_for_sampling, made_current

MODELS = {  # hidden size, conditioning, layers, heads
    "mini": (64, 16, 3, 4),  # what one tries an idea with
    "tiny": (256, 64, 8, 8),
    "small": (768, 128, 12, 12),
    "medium": (1024, 128, 24, 16),
}
VOCAB_SIZE = 50_258  # GPT-2's and the mask
COMPILED = {"false": False, "true": True, "graphs": "graphs"}  # as `sampling.compile` has it
REFERENCE_PASSES = 4
MASK, BOS = VOCAB_SIZE - 1, VOCAB_SIZE - 2


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of the table; times are wall-clock."""

    batch_size: int
    compiled: str  # a name of `COMPILED`
    tokens_per_second: float  # all rows together, whole texts
    reference_tokens_per_second: float
    last_over_first: float  # time of the last 100 tokens over that of the first 100
    products_tokens_per_second: float  # if a pass were its matrix products alone
    weights_mb: float
    cache_mb: float
    memory_mb: float  # peak above what the process had before the network was made


def build(
    model: str, *, block_size: int, device: torch.device, dtype: torch.dtype, packs: bool
) -> Denoiser:
    """A network of this size with random weights everywhere, its matrices as samplers have them."""
    hidden_size, cond_dim, n_blocks, n_heads = MODELS[model]
    torch.manual_seed(0)
    config = DITConfig(
        vocab_size=VOCAB_SIZE,
        block_size=block_size,
        hidden_size=hidden_size,
        cond_dim=cond_dim,
        n_blocks=n_blocks,
        n_heads=n_heads,
        attn_backend="auto",
    )
    backbone = DIT(config).to(device).eval()
    # The zero-initialised head would make every token equally likely. This spread of the logits
    # gives about the entropy of a trained model, 4 nats, which the speed of the nucleus depends on.
    torch.nn.init.normal_(backbone.output_layer.linear.weight, std=4.6 / hidden_size**0.5)
    cast_matrices(backbone, dtype, packs=packs)
    keep_freed_memory_for_sampling()
    return Denoiser(backbone=backbone, parameterization="subs", mask_index=MASK)


def time_products(denoise: Denoiser, *, batch_size: int, block_size: int) -> float:
    """Seconds of one pass's matrix products alone, the best of several tries."""
    network = denoise.backbone
    head, device, seconds = network.output_layer.linear, network.vocab_embed.embedding.device, []
    layers = [m for block in network.blocks for m in block.modules()]
    layers = [m for m in layers if isinstance(m, nn.Linear | PackedLinear)]
    layers = [m for m in layers if m.weight.shape[1] != network.config.cond_dim]
    pairs = [(m, batch_size * block_size) for m in layers] + [(head, batch_size)]
    like = {"device": device, "dtype": head.weight.dtype}
    pairs = [(m, torch.randn(rows, m.weight.shape[1], **like)) for m, rows in pairs]
    for _ in range(10):
        began = time.perf_counter()
        for layer, x in pairs:
            layer(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def time_steps(
    denoise: Denoiser, sampler: SemiAutoregressiveSampler, canvas: torch.Tensor
) -> list[float]:
    """Seconds of each pass of one sampling run."""
    stamps = [time.perf_counter()]

    def stamp(_tokens: torch.Tensor) -> None:
        if canvas.device.type == "cuda":
            torch.cuda.synchronize(canvas.device)
        stamps.append(time.perf_counter())

    generators = [torch.Generator(canvas.device).manual_seed(row) for row in range(len(canvas))]
    sampler.sample(denoise, canvas, generator=generators, on_step=stamp)
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def cached_sampler(block_size: int, *, use_cache: bool = True) -> SemiAutoregressiveSampler:
    """First-hitting with nucleus 0.9."""
    return SemiAutoregressiveSampler(
        block_size=block_size,
        mask_index=MASK,
        pad_index=BOS,
        pattern=AttentionPattern.BLOCK_CAUSAL,
        decoding=Decoding(nucleus_p=0.9),
        use_cache=use_cache,
    )


def blank_rows(arguments: argparse.Namespace, batch_size: int) -> torch.Tensor:
    """What a sampler starts from."""
    return blank_canvas(
        batch_size, arguments.length, bos_index=BOS, mask_index=MASK, device=arguments.device
    )


def time_text(
    denoise: Denoiser, sampler: SemiAutoregressiveSampler, canvas: torch.Tensor
) -> float:
    """Seconds of one sampling run on a GPU, which nobody waits for in between."""
    torch.cuda.synchronize(canvas.device)
    began = time.perf_counter()
    generators = [torch.Generator(canvas.device).manual_seed(row) for row in range(len(canvas))]
    sampler.sample(denoise, canvas, generator=generators)
    torch.cuda.synchronize(canvas.device)
    return time.perf_counter() - began


def measure(
    denoise: Denoiser,
    arguments: argparse.Namespace,
    *,
    batch_size: int,
    compiled: str,
    memory_before: float,
) -> Figures:
    """The figures of one batch size; memory in MB."""
    fast, device = denoise.for_sampling(compiled=COMPILED[compiled]), arguments.device
    length, block_size = arguments.length, arguments.block_size
    blank, cached = blank_rows(arguments, batch_size), cached_sampler(block_size)
    start_memory_measurement(device)
    # A whole text first: what compiles does so per shape, and memory is fresh only once.
    time_steps(fast, cached, blank)
    steps = time_steps(fast, cached, blank)
    is_cuda = device.type == "cuda"
    seconds = time_text(fast, cached, blank) if is_cuda else sum(steps)
    memory = peak_memory_mb(device)
    products = time_products(denoise, batch_size=batch_size, block_size=block_size)

    reference_steps, recomputing = [], cached_sampler(block_size, use_cache=False)
    for start in (0, length // block_size // 2 * block_size, length - block_size):
        canvas = blank[:, : start + block_size].clone()
        known = max(1, start + block_size - REFERENCE_PASSES)
        canvas[:, :known] = torch.randint(BOS, (batch_size, known), device=device)
        reference_steps += time_steps(denoise, recomputing, canvas)
    tensors = (*denoise.backbone.parameters(), *denoise.backbone.buffers())
    weights = sum(x.numel() * x.dtype.itemsize for x in tensors)
    config = denoise.backbone.config
    keys = 2 * config.n_blocks * batch_size * length * config.hidden_size
    return Figures(
        batch_size=batch_size,
        compiled=compiled,
        tokens_per_second=batch_size * (arguments.length - 1) / seconds,
        reference_tokens_per_second=batch_size * len(reference_steps) / sum(reference_steps),
        products_tokens_per_second=batch_size / products,
        last_over_first=sum(steps[-100:]) / sum(steps[:100]),
        weights_mb=weights / 1e6,
        cache_mb=keys * fast.backbone.dtype.itemsize / 1e6,
        memory_mb=memory - memory_before,
    )


def draw(
    denoise: Denoiser, arguments: argparse.Namespace, *, batch_size: int, compiled: str
) -> torch.Tensor:
    """The texts of seeds 0, 1, ..., one per row, drawn twice and taken from the second time.

    A compiled pass records the first time, and replays the second.
    """
    fast = denoise.for_sampling(compiled=COMPILED[compiled])
    for _ in range(2):
        generators = [
            torch.Generator(arguments.device).manual_seed(row) for row in range(batch_size)
        ]
        found = cached_sampler(arguments.block_size).sample(
            fast, blank_rows(arguments, batch_size), generator=generators
        )
    return found.tokens


@dataclass(frozen=True, kw_only=True)
class Texts:
    """How many texts of a batch are those of the first way."""

    batch_size: int
    compiled: str
    texts: int
    equal: int


def rows_of(
    arguments: argparse.Namespace, *, failed: dict[str, str]
) -> Iterator[Figures | Texts]:
    """A row for each batch size and way of `--compile`; one that fails is named and left out."""
    is_bf16 = arguments.precision == "bf16"
    memory_before = start_memory_measurement(arguments.device)
    for batch_size in arguments.batch_size:
        expected = None
        for compiled in arguments.compile:
            named = {"batch_size": batch_size, "compiled": compiled}
            torch._dynamo.reset()
            try:
                denoise = build(
                    arguments.model,
                    block_size=arguments.block_size,
                    device=arguments.device,
                    dtype=torch.bfloat16 if is_bf16 else torch.float32,
                    packs=compiled != "true",
                )
                with (
                    torch.no_grad(),
                    torch.autocast(arguments.device.type, dtype=torch.bfloat16, enabled=is_bf16),
                ):
                    if not arguments.texts:
                        yield measure(denoise, arguments, memory_before=memory_before, **named)
                        continue
                    tokens = draw(denoise, arguments, **named)
            except Exception as error:  # a compiler's are of any kind
                what = f"batch {batch_size}, compile={compiled}"
                failed[what] = f"{type(error).__name__}: {error}".split("\n")[0]
                print(f"left out: {what}: {failed[what]}", file=sys.stderr, flush=True)
                continue
            expected = tokens if expected is None else expected
            equal = (tokens == expected).all(dim=1).sum().item()
            yield Texts(texts=batch_size, equal=equal, **named)


def print_figures(rows: list[Figures], where: dict, *, title: str) -> None:
    """The table of a run."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    headings = (
        "batch", "compile", "tokens/s", "recomputing", "ratio", "products alone",
        "last / first 100", "MB beyond weights and cache",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = row.tokens_per_second / row.reference_tokens_per_second
        table.add_row(
            str(row.batch_size),
            row.compiled,
            f"{row.tokens_per_second:,.1f}",
            f"{row.reference_tokens_per_second:,.1f}",
            f"{ratio:.1f} x",
            f"{row.products_tokens_per_second:,.1f}",
            f"{row.last_over_first:.2f}",
            f"{row.memory_mb - row.weights_mb - row.cache_mb:,.0f}",
        )
    Console().print(table)


def print_texts(rows: list[Texts]) -> None:
    """A line per row."""
    for row in rows:
        print(f"batch {row.batch_size}, compile={row.compiled}: {row.equal} of {row.texts} equal")


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", choices=COMPILED, nargs="*", default=["false"],
                        help="sampling.compile; a row for each, without a value true")  # fmt: skip
    parser.add_argument("--texts", action="store_true", help="compare texts, and time nothing")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(words)
    if arguments.length % arguments.block_size:
        parser.error(f"--length {arguments.length} is no multiple of --block-size")
    arguments.compile = arguments.compile or ["true"]
    arguments.device = made_current(torch.device(arguments.device))
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, print the table and write JSON where wanted."""
    arguments = options(words)
    where = description(arguments.device)
    keep_freed_memory()
    title = (
        f"{arguments.model}, N = {arguments.length}, L = {arguments.block_size}, "
        f"{arguments.precision}"
    )
    rows, failed = [], {}

    def write() -> None:
        if arguments.json is not None:
            record = {"title": title, "rows": [asdict(row) for row in rows], "failed": failed}
            write_json(arguments.json, where | record)

    for row in rows_of(arguments, failed=failed):
        rows.append(row)
        write()
    write()  # what has failed since
    if arguments.texts:
        print_texts(rows)
    else:
        print_figures(rows, where, title=title)
    if not rows:
        sys.exit(f"nothing worked: {failed}")


if __name__ == "__main__":
    main()
