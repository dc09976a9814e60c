"""How time and memory of a training step grow with the length N, the block size L and the batch.

    python -m benchmarks.scaling --max-seconds 1200 --json scaling.json --picture scaling.png

One of the three varies, the others stay at N = 1,024 (`--length`), L = 16 and batch 1. Points are
measured from the smallest on, in turns between the three, each in a process of its own; no point
begins, and none goes on, after `--max-seconds`, so that a slow machine measures fewer of them.
Figures are those of `benchmarks.train_step`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.comparison import WIDTH
from benchmarks.machine import description, write_json
from benchmarks.measure import DTYPES, JobFailed, Result, measure_apart
from benchmarks.sampling import MODELS
from benchmarks.steps import Job

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BLOCK_SIZES = (1, 4, 16, 64, 256, 1024)
BATCH_SIZES = (1, 2, 4, 8)
VARIES = {"length": "N", "block_size": "L", "batch_size": "batch"}
# Linear growth is drawn beside the measured time, through its first point.
MEASURED, LINEAR = "#2f5597", "#b8c7e0"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement; `varies` names the field of the job that differs in its row."""

    varies: str
    length: int
    block_size: int
    batch_size: int
    seconds: float
    tokens_per_second: float
    memory_mb: float
    model_tflops: float
    share_of_peak: float

    @property
    def value(self) -> int:
        """Of what varies."""
        return getattr(self, self.varies)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--length", type=int, default=1024, help="N where L or batch varies")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--block-sizes", type=int, nargs="*", default=BLOCK_SIZES)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=BATCH_SIZES)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--side", choices=("ours", "reference"), default="ours")
    parser.add_argument("--compile", choices=("auto", "true", "false"), nargs="?", default="auto",
                        const="true", help="training.compile")  # fmt: skip
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--warmup", type=int, default=3 if has_gpu else 2, help="steps not timed")
    parser.add_argument("--steps", type=int, default=10 if has_gpu else 1, help="timed steps")
    parser.add_argument("--max-seconds", type=float, default=1800.0, help="of everything")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--picture", type=Path, help="draw them into this .png")
    arguments = parser.parse_args(words)
    for length in (arguments.length, *arguments.lengths):
        if length % 16:
            parser.error(f"length {length} is no multiple of 16, the block size where N varies")
    for block_size in arguments.block_sizes:
        if arguments.length % block_size:
            parser.error(f"--length {arguments.length} is no multiple of block size {block_size}")
    return arguments


def plan(arguments: argparse.Namespace) -> list[tuple[str, Job]]:
    """What varies and the job, in the order of measurement."""
    fixed = {"length": arguments.length, "block_size": 16, "batch_size": 1}
    rows = [
        [("length", n) for n in sorted(arguments.lengths)],
        [("block_size", size) for size in sorted(arguments.block_sizes)],
        [("batch_size", size) for size in sorted(arguments.batch_sizes)],
    ]
    in_turns = [point for points in zip_longest(*rows) for point in points if point is not None]
    return [
        (
            varies,
            Job(
                work="train",
                side=arguments.side,
                model=arguments.model,
                precision=arguments.precision,
                compiled=arguments.compile,
                device=arguments.device,
                warmup=arguments.warmup,
                steps=arguments.steps,
                **(fixed | {varies: value}),
            ),
        )
        for varies, value in in_turns
    ]


def measure_points(
    jobs: list[tuple[str, Job]], *, max_seconds: float
) -> tuple[list[Point], list[str]]:
    """The points in time, and what was left out and why.

    A job that occurs twice is measured once. Where a point fails (its memory, say), larger ones of
    the same row are left out.
    """
    began, known = time.perf_counter(), {}
    points, left_out, ended = [], [], set()
    for varies, job in jobs:
        name = f"{VARIES[varies]} = {getattr(job, varies)}"
        remaining = max_seconds - (time.perf_counter() - began)
        if job not in known and (remaining <= 0 or varies in ended):
            reason = "out of time" if remaining <= 0 else "a smaller one failed"
            left_out.append(f"{name}: {reason}")
            continue
        if job not in known:
            print(f"{name}, {remaining:.0f} s left", file=sys.stderr, flush=True)
            try:
                known[job] = measure_apart(job, timeout=remaining)
            except JobFailed as error:
                left_out.append(f"{name}: {str(error).split(':')[0]}")
                ended.add(varies)
                continue
        points.append(point_of(varies, job, known[job]))
    return points, left_out


def point_of(varies: str, job: Job, result: Result) -> Point:
    """The figures of one job."""
    seconds = statistics.median(result.seconds)
    return Point(
        varies=varies,
        length=job.length,
        block_size=job.block_size,
        batch_size=job.batch_size,
        seconds=seconds,
        tokens_per_second=job.batch_size * job.length / seconds,
        memory_mb=result.memory_mb,
        model_tflops=result.flops / 1e12,
        share_of_peak=result.flops / seconds / result.peak_flops,
    )


def print_points(points: list[Point], left_out: list[str], where: dict, *, title: str) -> None:
    """The table of a run, a section for each of what varies."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    headings = ("N", "L", "batch", "s per\nstep", "tokens\nper s", "peak\nMB", "model\nTFLOP",
                "of\npeak")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for varies in VARIES:
        for point in (point for point in points if point.varies == varies):
            table.add_row(
                f"{point.length:,}",
                str(point.block_size),
                str(point.batch_size),
                f"{point.seconds:.3g}",
                f"{point.tokens_per_second:,.0f}",
                f"{point.memory_mb:,.0f}",
                f"{point.model_tflops:.3g}",
                f"{point.share_of_peak:.0%}",
            )
        table.add_section()
    console = Console(width=WIDTH)
    console.print(table)
    for line in left_out:
        console.print(f"left out: {line}")


def draw(points: list[Point], png: Path, *, title: str) -> None:
    """Time and memory over N, L and batch, into a PNG; both axes are logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, len(VARIES), sharey="row")
    units = (("seconds", "seconds per step", 1), ("memory_mb", "peak memory in GB", 1e-3))
    for row, (field, label, factor) in zip(axes, units, strict=True):
        row[0].set_ylabel(label)
        for panel, (varies, symbol) in zip(row, VARIES.items(), strict=True):
            drawn = sorted((p for p in points if p.varies == varies), key=lambda p: p.value)
            values = [point.value for point in drawn]
            measured = [factor * getattr(point, field) for point in drawn]
            if drawn and field == "seconds" and varies != "block_size":
                linear = [measured[0] * value / values[0] for value in values]
                panel.plot(values, linear, "--", color=LINEAR, label="linear")
            panel.plot(values, measured, "o-", color=MEASURED, label="measured")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.set_xlabel(symbol)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 6, 8)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
    axes[0][0].legend()
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print the table, write JSON and picture where wanted."""
    arguments = options(words)
    where = description(torch.device(arguments.device))
    points, left_out = measure_points(plan(arguments), max_seconds=arguments.max_seconds)
    title = (
        f"training step: bd3lm, {arguments.model}, {arguments.precision}, {arguments.side}, "
        f"compile={arguments.compile}"
    )
    print_points(points, left_out, where, title=title)
    if arguments.json is not None:
        rows = [asdict(point) for point in points]
        write_json(arguments.json, where | {"title": title, "rows": rows, "left_out": left_out})
    if arguments.picture is not None:
        draw(points, arguments.picture, title=title)


if __name__ == "__main__":
    main()
