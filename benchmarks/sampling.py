"""How fast bd3lm samples: with the KV cache, beside recomputing the window in every step.

    python -m benchmarks.sampling --batch-size 1 16 --json sampling.json

Random weights, first-hitting, nucleus 0.9. Both figures of a row come from the same run. The
recomputing sampler is timed on four passes in each of three blocks, at the start, the middle and
the end of the text, because a whole text would take minutes per row; its figure is their mean.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import description, peak_memory_mb, start_memory_measurement
from models.denoiser import Denoiser
from models.dit import DIT, DITConfig
from models.inference import cast_matrices
from models.kernels.packed_linear import PackedLinear
from models.masks import AttentionPattern
from sampling.base import blank_canvas
from sampling.decoding import Decoding
from sampling.semi_ar import SemiAutoregressiveSampler
from utils import json_text, keep_freed_memory, keep_freed_memory_for_sampling, made_current

MODELS = {  # hidden size, conditioning, layers, heads
    "tiny": (256, 64, 8, 8),
    "small": (768, 128, 12, 12),
    "medium": (1024, 128, 24, 16),
}
VOCAB_SIZE = 50_258  # GPT-2's and the mask
REFERENCE_PASSES = 4
FORMS = {False: "", True: ", compiled", "graphs": ", CUDA graphs"}
MASK, BOS = VOCAB_SIZE - 1, VOCAB_SIZE - 2


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of the table; times are wall-clock."""

    batch_size: int
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
    *,
    batch_size: int,
    length: int,
    block_size: int,
    device: torch.device,
    memory_before: float,
    compiled: bool | str,
) -> Figures:
    """The figures of one batch size; memory in MB."""
    fast = denoise.for_sampling(compiled=compiled)

    def sampler(*, use_cache: bool) -> SemiAutoregressiveSampler:
        return SemiAutoregressiveSampler(
            block_size=block_size,
            mask_index=MASK,
            pad_index=BOS,
            pattern=AttentionPattern.BLOCK_CAUSAL,
            decoding=Decoding(nucleus_p=0.9),
            use_cache=use_cache,
        )

    blank = blank_canvas(
        batch_size, length, bos_index=BOS, mask_index=MASK, device=device
    )
    cached = sampler(use_cache=True)
    start_memory_measurement(device)
    # A whole text first: what compiles does so per shape, and memory is fresh only once.
    time_steps(fast, cached, blank)
    steps = time_steps(fast, cached, blank)
    is_cuda = device.type == "cuda"
    seconds = time_text(fast, cached, blank) if is_cuda else sum(steps)
    memory = peak_memory_mb(device)
    products = time_products(denoise, batch_size=batch_size, block_size=block_size)

    reference_steps = []
    for start in (0, length // block_size // 2 * block_size, length - block_size):
        canvas = blank[:, : start + block_size].clone()
        known = max(1, start + block_size - REFERENCE_PASSES)
        canvas[:, :known] = torch.randint(BOS, (batch_size, known), device=device)
        reference_steps += time_steps(denoise, sampler(use_cache=False), canvas)
    tensors = (*denoise.backbone.parameters(), *denoise.backbone.buffers())
    weights = sum(x.numel() * x.dtype.itemsize for x in tensors)
    config = denoise.backbone.config
    keys = 2 * config.n_blocks * batch_size * length * config.hidden_size
    return Figures(
        batch_size=batch_size,
        tokens_per_second=batch_size * (length - 1) / seconds,
        reference_tokens_per_second=batch_size * len(reference_steps) / sum(reference_steps),
        products_tokens_per_second=batch_size / products,
        last_over_first=sum(steps[-100:]) / sum(steps[:100]),
        weights_mb=weights / 1e6,
        cache_mb=keys * fast.backbone.dtype.itemsize / 1e6,
        memory_mb=memory - memory_before,
    )


def print_figures(rows: list[Figures], where: dict, *, title: str) -> None:
    """The table of a run."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    headings = (
        "batch", "tokens/s", "recomputing", "ratio", "products alone", "last / first 100",
        "MB beyond weights and cache",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        ratio = row.tokens_per_second / row.reference_tokens_per_second
        table.add_row(
            str(row.batch_size),
            f"{row.tokens_per_second:,.1f}",
            f"{row.reference_tokens_per_second:,.1f}",
            f"{ratio:.1f} x",
            f"{row.products_tokens_per_second:,.1f}",
            f"{row.last_over_first:.2f}",
            f"{row.memory_mb - row.weights_mb - row.cache_mb:,.0f}",
        )
    Console().print(table)


def main() -> None:
    """Measure what the command line asks for, print the table and write JSON where wanted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="static shapes, CUDA graphs")
    parser.add_argument("--graphs", action="store_true", help="the same without compiling")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if arguments.length % arguments.block_size:
        parser.error(f"--length {arguments.length} is no multiple of --block-size")
    device = made_current(torch.device(arguments.device))
    where = description(device)
    is_bf16 = arguments.precision == "bf16"
    form = "graphs" if arguments.graphs else arguments.compile
    keep_freed_memory()
    memory_before = start_memory_measurement(device)
    denoise = build(
        arguments.model,
        block_size=arguments.block_size,
        device=device,
        dtype=torch.bfloat16 if is_bf16 else torch.float32,
        packs=form is not True,
    )
    rows = []
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
        for batch_size in arguments.batch_size:
            rows.append(
                measure(
                    denoise,
                    batch_size=batch_size,
                    length=arguments.length,
                    block_size=arguments.block_size,
                    device=device,
                    memory_before=memory_before,
                    compiled=form,
                )
            )
    title = (
        f"{arguments.model}, N = {arguments.length}, L = {arguments.block_size}, "
        f"{arguments.precision}{FORMS[form]}"
    )
    print_figures(rows, where, title=title)
    if arguments.json is not None:
        record = where | {"title": title, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json_text(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
