"""What a GPU should reach: time of a training step and of sampling, and hours of whole runs.

    python -m benchmarks.roofline --gpu H100 --model small --batch-size 32

Counts the arithmetic, the bytes that memory must move and the kernels of each part of a step, and
divides them by what the GPU can do. It says what to expect before anything is measured, and which
part is worth work; it is a prediction, and `benchmarks.train_step` measures.

The FLOPs of the model are those of `benchmarks.flops`. Beyond them a step computes the head's
logits once more, and in attention everything in a tile of which anything is visible, its scores
anew in the backward pass (7 products for the model's 6). Bytes of the elementwise part are those of
one kernel between any two products, table `ELEMENTWISE`. A part takes the longer of both times, and
the step at least as long as the launches take. What is assumed and no count: `Gpu` and `SHARES`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import ALGOS, read_options
from benchmarks.flops import forward_flops, scored_tokens, visible_pairs
from benchmarks.machine import description, write_json
from benchmarks.sampling import MODELS, VOCAB_SIZE
from losses.forward_process import FULL
from models.dit import DIT, DITConfig
from models.masks import AttentionPattern, may_attend


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device.

    Attributes:
        tflops: dense bf16, of the data sheet.
        bandwidth: of its memory in TB/s, of the data sheet.
        compute_share: of `tflops` that one large product reaches: 790 and 989 on an H100, where it
            was measured; assumed for others.
        bandwidth_share: of `bandwidth` that a large copy reaches: 2.8 and 3.35 on an H100.
        launch_us: of the CPU for one operation of an eager pass; assumed.
        gap_us: between two kernels of a recorded pass, and the least that one takes; assumed.
    """

    tflops: float
    bandwidth: float
    compute_share: float = 0.8
    bandwidth_share: float = 0.84
    launch_us: float = 6.0
    gap_us: float = 2.5

    @property
    def flops(self) -> float:
        """FLOP/s of a large product, which shares of the peak refer to."""
        return self.tflops * 1e12 * self.compute_share

    @property
    def bytes(self) -> float:
        """Bytes/s of a large copy."""
        return self.bandwidth * 1e12 * self.bandwidth_share


GPUS = {
    "H100": Gpu(tflops=989, bandwidth=3.35),  # SXM
    "H200": Gpu(tflops=989, bandwidth=4.8),
    "A100": Gpu(tflops=312, bandwidth=2.04),  # SXM, 80 GB
    "A5000": Gpu(tflops=111, bandwidth=0.768),  # RTX A5000
}
# Of a large product's rate that products of these sizes reach, and FlexAttention; assumed.
SHARES = {"products": 0.67, "attention": 0.22}
# Bytes per token, layer and hidden unit: (of the residual stream, of bf16 tensors, of masks), in
# the forward and in the backward pass. Products read and write theirs beside that.
ELEMENTWISE = {
    "norm and modulation, twice": ((2, 2, 0), (6, 2, 0)),
    "heads and rotation": ((0, 6, 0), (0, 6, 0)),
    "dropout, gate and sum, twice": ((4, 2, 2), (2, 2, 2)),
    "GELU, four times as wide, once more behind": ((0, 8, 0), (0, 16, 0)),
    "gradients of biases": ((0, 0, 0), (0, 5, 0)),
}
# Per weight: AdamW 28, clipping 12, moving average 32, copies in bf16 and gradients of them 12.
BYTES_PER_WEIGHT = 84
# Bytes per logit. In float32 chunks each of some twenty operations reads and writes; fused ones
# write logits in bf16 and read them, twice, and read the gradient for two products.
HEAD_BYTES = {"chunked": 60, "fused": 14}
# Kernels: of a compiled layer forward and backward, of the rest of a step, of a chunk of the head,
# of an eager and of a recorded pass of the sampler per layer, and of drawing tokens.
LAYER_KERNELS, OTHER_KERNELS, CHUNK_KERNELS = 44, 250, {"chunked": 43, "fused": 10}
EAGER_KERNELS, RECORDED_KERNELS, DRAW_KERNELS = 20, 14, 60
CHUNK_LOGITS = {"chunked": 2**22, "fused": 2**28}  # at a time; of chunked at least 512 tokens


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of one step of all rows; `milliseconds` on the device."""

    name: str
    flops: float
    bytes: float
    launches: float
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained: `head` chunked or fused, `residual` its bytes per number."""

    config: DITConfig
    algo: str = "bd3lm"
    length: int = 1024
    batch_size: int = 32
    tile: int = 128
    head: str = "fused"
    residual: int = 4

    @property
    def has_clean_half(self) -> bool:
        return self.algo == "bd3lm" and self.config.block_size < self.length


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step.

    Attributes:
        parts: of it.
        milliseconds: the sum of the parts, or the launches where they take longer.
        tokens_per_second: clean tokens.
        share_of_peak: model FLOPs per second, of a large product's.
    """

    parts: list[Part]
    milliseconds: float
    tokens_per_second: float
    share_of_peak: float


def make_config(
    *, hidden_size: int, n_blocks: int, n_heads: int, cond_dim: int, block_size: int,
    vocab_size: int = VOCAB_SIZE, adaln: bool = True,
) -> DITConfig:  # fmt: skip
    """The sizes of a network."""
    return DITConfig(
        vocab_size=vocab_size, block_size=block_size, hidden_size=hidden_size, cond_dim=cond_dim,
        n_blocks=n_blocks, n_heads=n_heads, adaln=adaln,
    )  # fmt: skip


def num_weights(config: DITConfig) -> int:
    """Weights of the network."""
    with torch.device("meta"):
        return sum(p.numel() for p in DIT(config).parameters())


def computed_pairs(
    pattern: AttentionPattern, *, q_len: int, kv_len: int, block_size: int, tile: int
) -> int:
    """Pairs of a query and a key in tiles of tile x tile of which any pair is visible."""
    keys = torch.arange(kv_len)
    padded = torch.zeros(tile, -(-kv_len // tile) * tile, dtype=torch.bool)
    tiles = 0
    for start in range(0, q_len, tile):
        queries = torch.arange(start, min(start + tile, q_len))
        padded.zero_()
        padded[: len(queries), :kv_len] = may_attend(
            queries[:, None], keys, pattern=pattern, length=kv_len // 2, block_size=block_size
        )
        tiles += padded.view(tile, -1, tile).any(dim=2).any(dim=0).sum().item()
    return tiles * tile**2


def attention_pairs(work: Workload) -> tuple[float, float]:
    """(computed, visible) pairs of all layers of one row; in the last one queries are x_t alone."""
    length, layers = work.length, work.config.n_blocks
    seen = visible_pairs(algo=work.algo, length=length, block_size=work.config.block_size)
    visible = layers * seen.noisy + (layers - 1) * seen.clean
    if not work.has_clean_half:  # SDPA skips what is not causal, and masks nothing else
        return visible, visible
    noisy, both = (
        computed_pairs(
            AttentionPattern.BLOCK_DIFFUSION, q_len=q_len, kv_len=2 * length,
            block_size=work.config.block_size, tile=work.tile,
        )
        for q_len in (length, 2 * length)
    )  # fmt: skip
    return (layers - 1) * both + noisy, visible


def training_step(work: Workload, gpu: Gpu) -> Step:
    """Predict one training step."""
    config, rows = work.config, work.batch_size
    dim, layers, vocab = config.hidden_size, config.n_blocks, config.vocab_size
    model = forward_flops(config, algo=work.algo, length=work.length, interval=FULL).total
    scored = scored_tokens(algo=work.algo, length=work.length, interval=FULL)
    computed, visible = attention_pairs(work)
    head = 2 * dim * vocab * scored
    weights = num_weights(config)
    tokens = rows * work.length * ((2 * layers - 1) if work.has_clean_half else layers)
    matrices = 24 * dim**2 * layers
    chunks = math.ceil(rows * scored * vocab / CHUNK_LOGITS[work.head])
    if work.head == "chunked":
        chunks = min(chunks, math.ceil(vocab / 512))

    def part(name: str, *, flops=0.0, share=1.0, moved=0.0, launches=0.0, adds=False) -> Part:
        seconds = (flops / (gpu.flops * share), moved / gpu.bytes)
        milliseconds = 1e3 * (sum(seconds) if adds else max(seconds))
        return Part(
            name=name, flops=flops, bytes=moved, launches=launches, milliseconds=milliseconds
        )

    parts = [
        part("linear layers", flops=3 * rows * (model - head - 4 * dim * visible),
             share=SHARES["products"], moved=3 * matrices * 2 + tokens * dim * 2 * 3 * 18,
             launches=12 * layers),
        part("attention", flops=3.5 * rows * 4 * dim * computed, share=SHARES["attention"],
             moved=tokens * dim * 2 * 12, launches=4 * layers),
        # Products wait for the elementwise part, and it for them.
        part("head", flops=4 * rows * head, share=SHARES["products"], adds=True,
             moved=rows * scored * vocab * HEAD_BYTES[work.head],
             launches=chunks * CHUNK_KERNELS[work.head]),
        part("elementwise", moved=tokens * dim * elementwise_bytes(work.residual),
             launches=(LAYER_KERNELS - 16) * layers),
        part("optimizer and average", moved=weights * BYTES_PER_WEIGHT, launches=OTHER_KERNELS),
    ]  # fmt: skip
    launching = 1e-3 * gpu.launch_us * sum(p.launches for p in parts)
    milliseconds = max(sum(p.milliseconds for p in parts), launching)
    return Step(
        parts=parts,
        milliseconds=milliseconds,
        tokens_per_second=1e3 * rows * work.length / milliseconds,
        share_of_peak=3 * rows * model / (milliseconds / 1e3) / gpu.flops,
    )


def elementwise_bytes(residual: int) -> float:
    """Bytes per token, layer and hidden unit, forward and backward."""
    sizes = (residual, 2, 1)
    return sum(
        sum(n * size for n, size in zip(counts, sizes, strict=True))
        for passes in ELEMENTWISE.values()
        for counts in passes
    )


def sampling_rate(work: Workload, gpu: Gpu, *, batch_size: int, recorded: bool) -> float:
    """Tokens per second of first-hitting with the KV cache, all rows together.

    A pass reads all matrices and, in the mean, half of the cache; a block has one pass per token
    and one that stores it.
    """
    config, block = work.config, work.config.block_size
    dim, layers, vocab = config.hidden_size, config.n_blocks, config.vocab_size
    rows = batch_size * block
    flops = 24 * dim**2 * layers * rows + 2 * dim * vocab * batch_size
    matrices = 2 * (12 * dim**2 * layers + dim * vocab)
    cache = 2 * 2 * dim * layers * batch_size * work.length / 2
    # Between products some 40 bytes per unit, and the draw passes over float32 logits ten times.
    others = rows * dim * layers * 40 + batch_size * vocab * 40
    products = max(flops / (gpu.flops * SHARES["products"]), matrices / gpu.bytes)
    busy = products + (cache + others) / gpu.bytes
    if recorded:  # the draw is not
        launching = layers * RECORDED_KERNELS * gpu.gap_us + DRAW_KERNELS * gpu.launch_us
    else:
        launching = (layers * EAGER_KERNELS + DRAW_KERNELS) * gpu.launch_us
    seconds = max(busy, 1e-6 * launching)
    return batch_size / seconds * block / (block + 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training of the paper: phases of (algo, block size, steps) at a global batch of 512."""

    name: str
    length: int
    vocab_size: int
    phases: list[tuple[str, int, float]]


def paper_runs() -> list[Run]:
    """Of tables 3 and 4: 1M steps; bd3lm's first 850K have one block, as mdlm has."""
    runs = []
    for data, length, vocab_size in (("OWT", 1024, VOCAB_SIZE), ("LM1B", 128, 30_523)):
        for algo in ("ar", "sedd", "mdlm"):
            runs.append(Run(name=f"{data}, {algo}", length=length, vocab_size=vocab_size,
                            phases=[(algo, length, 1e6)]))  # fmt: skip
        for size in (16, 8, 4):
            phases = [("bd3lm", length, 850e3), ("bd3lm", size, 150e3)]
            runs.append(Run(name=f"{data}, bd3lm, L = {size}", length=length,
                            vocab_size=vocab_size, phases=phases))  # fmt: skip
    return runs


def hours(run: Run, work: Workload, gpu: Gpu, *, global_batch_size: int = 512) -> float:
    """GPU hours of a run, with the rows of `work` on a GPU at a time, however many GPUs."""
    total = 0.0
    for algo, block_size, steps in run.phases:
        config = replace(
            work.config, block_size=block_size, vocab_size=run.vocab_size, adaln=algo != "ar"
        )
        # Shorter rows come in larger batches.
        rows = work.batch_size * work.length // run.length
        step = training_step(
            replace(work, config=config, algo=algo, length=run.length, batch_size=rows), gpu
        )
        total += steps * global_batch_size * run.length / step.tokens_per_second / 3600
    return total


# --- the command -----------------------------------------------------------------------------


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    for figure in ("tflops", "bandwidth", "compute-share", "bandwidth-share", "launch-us",
                   "gap-us"):  # fmt: skip
        parser.add_argument(f"--{figure}", type=float, help="instead of the GPU's, see `Gpu`")
    parser.add_argument("--model", choices=MODELS, default="small")
    for size in ("hidden-size", "n-blocks", "n-heads", "cond-dim"):
        parser.add_argument(f"--{size}", type=int, help="instead of the model's")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="with the mask")
    parser.add_argument("--algo", choices=ALGOS, default="bd3lm")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--block-size", type=int, help="of bd3lm (default 16)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows on a GPU at a time")
    parser.add_argument("--tile", type=int, default=128, help="of FlexAttention's block mask")
    parser.add_argument("--head", choices=HEAD_BYTES, default="fused")
    parser.add_argument("--residual", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--sampling-batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--steps", type=float, default=1e6, help="of the run that is priced")
    parser.add_argument("--global-batch-size", type=int, default=512, help="of it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return read_options(parser, words)


def asked_gpu(arguments: argparse.Namespace) -> Gpu:
    """The preset with the figures that were given."""
    names = ("tflops", "bandwidth", "compute_share", "bandwidth_share", "launch_us", "gap_us")
    given = {name: getattr(arguments, name) for name in names}
    return replace(GPUS[arguments.gpu], **{k: v for k, v in given.items() if v is not None})


def asked_workload(arguments: argparse.Namespace) -> Workload:
    """The model with the sizes that were given."""
    sizes = dict(zip(("hidden_size", "cond_dim", "n_blocks", "n_heads"),
                     MODELS[arguments.model], strict=True))  # fmt: skip
    sizes |= {k: getattr(arguments, k) for k in sizes if getattr(arguments, k) is not None}
    config = make_config(
        **sizes, block_size=arguments.block_size, vocab_size=arguments.vocab_size,
        adaln=arguments.algo != "ar",
    )  # fmt: skip
    return Workload(
        config=config, algo=arguments.algo, length=arguments.length,
        batch_size=arguments.batch_size, tile=arguments.tile, head=arguments.head,
        residual=4 if arguments.residual == "float32" else 2,
    )  # fmt: skip


def predict(arguments: argparse.Namespace) -> dict:
    """All figures of the command."""
    gpu, work = asked_gpu(arguments), asked_workload(arguments)
    step = training_step(work, gpu)
    computed, visible = attention_pairs(work)
    tokens = arguments.steps * arguments.global_batch_size * work.length
    sampling = []
    if work.algo == "bd3lm":  # the others have no cache of blocks
        sampling = [
            {"batch_size": n, "recorded": recorded,
             "tokens_per_second": sampling_rate(work, gpu, batch_size=n, recorded=recorded)}
            for n in arguments.sampling_batch_sizes
            for recorded in (False, True)
        ]  # fmt: skip
    return {
        "gpu": {"name": arguments.gpu} | asdict(gpu),
        "workload": asdict(work),
        "step": asdict(step),
        "visible_share_of_tiles": visible / computed,
        "run_hours": tokens / step.tokens_per_second / 3600,
        "sampling": sampling,
        "paper_hours": {run.name: hours(run, work, gpu) for run in paper_runs()},
    }


def print_prediction(found: dict, arguments: argparse.Namespace) -> None:
    """Tables of the step, of sampling and of hours."""
    console, step = Console(width=100), found["step"]
    blocks = f", L = {arguments.block_size}" if arguments.algo == "bd3lm" else ""
    title = (
        f"predicted training step, {arguments.algo}, {arguments.model}, N = {arguments.length}"
        f"{blocks}, batch {arguments.batch_size}, bf16, {arguments.gpu}, {arguments.head} head"
    )
    console.print(title, highlight=False)
    table = Table()
    table.add_column("part")
    for heading in ("TFLOP", "GB", "launches", "ms"):
        table.add_column(heading, justify="right")
    for part in step["parts"]:
        table.add_row(
            part["name"], f"{part['flops'] / 1e12:.2f}", f"{part['bytes'] / 1e9:.1f}",
            f"{part['launches']:,.0f}", f"{part['milliseconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    gpu = found["gpu"]
    lines = [
        f"step {step['milliseconds']:,.1f} ms, {step['tokens_per_second']:,.0f} tokens/s, "
        f"{step['share_of_peak']:.0%} of a large product's rate; "
        f"{found['visible_share_of_tiles']:.0%} of attention's computed area is visible",
        *(f"sampling, batch {row['batch_size']}, {'recorded' if row['recorded'] else 'eager'}: "
          f"{row['tokens_per_second']:,.0f} tokens/s" for row in found["sampling"]),
        f"{arguments.steps:,.0f} steps of {arguments.global_batch_size} rows: "
        f"{found['run_hours']:,.0f} GPU hours",
        f"data sheet: {gpu['tflops']:g} TFLOP/s bf16, {gpu['bandwidth']:g} TB/s; assumed: "
        f"{gpu['compute_share']:g} and {gpu['bandwidth_share']:g} of them, "
        f"{SHARES['products']:g} and {SHARES['attention']:g} of that in products and attention, "
        f"{gpu['launch_us']:g} us a launch",
    ]  # fmt: skip
    for line in lines:
        console.print(line, highlight=False)
    table = Table()
    table.add_column("run of the paper's tables 3 and 4")
    table.add_column("GPU hours", justify="right")
    for name, value in found["paper_hours"].items():
        table.add_row(name, f"{value:,.0f}")
    console.print(table)


def main(words: Sequence[str] | None = None) -> None:
    """Predict what the command line asks for, print it and write JSON where wanted."""
    arguments = options(words)
    found = predict(arguments)
    print_prediction(found, arguments)
    if arguments.json is not None:
        write_json(arguments.json, description(torch.device("cpu")) | found)


if __name__ == "__main__":
    sys.exit(main())
