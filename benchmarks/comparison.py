"""What the benchmarks of whole steps share: options, rounds, the table and its JSON."""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import description, write_json
from benchmarks.measure import DTYPES, JobFailed, Result, measure_apart
from benchmarks.sampling import MODELS
from benchmarks.steps import Job
from models.attention import BACKENDS

ALGOS = ("ar", "mdlm", "sedd", "bd3lm")
WIDTH = 110  # of a table: a narrower one would cut figures off


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of the table; ratios are None where there is no reference."""

    name: str
    seconds: float  # of a step, the median
    tokens_per_second: float  # clean tokens
    times_reference: float | None  # how many times as fast as the reference
    memory_mb: float
    memory_of_reference: float | None  # as a share of the reference's
    passes_mb: float  # the most without the optimizer's moments and the moving average
    passes_of_reference: float | None
    model_tflops: float  # per step, in units of 1e12
    share_of_peak: float  # model FLOP/s of the machine's matrix products in this precision


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is timed, beside what."""
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--algo", choices=ALGOS, default="bd3lm")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--block-size", type=int, help="of bd3lm (default 16)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=Job.vocab_size, help="without the mask")
    parser.add_argument("--against", choices=("reference",), help="what the original does")
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=["bf16", "float32"])
    parser.add_argument("--attn-backend", choices=BACKENDS, nargs="+", default=["auto"])
    parser.add_argument("--compile", choices=("auto", "true", "false"), nargs="?", default="auto",
                        const="true", help="training.compile, of ours alone")  # fmt: skip
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--warmup", type=int, default=3 if has_gpu else 2, help="steps not timed")
    parser.add_argument("--steps", type=int, default=10 if has_gpu else 2, help="per round")
    parser.add_argument("--rounds", type=int, default=1 if has_gpu else 2,
                        help="how often all rows are timed, in turns")  # fmt: skip
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS",
                        help="profile so many more steps, and what they launch")  # fmt: skip
    parser.add_argument("--peak-size", type=int,
                        help="of the matrix product that is called the peak")  # fmt: skip
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE",
                        help="more of the configuration, as main.py takes it")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures here too")


def read_options(
    parser: argparse.ArgumentParser, words: Sequence[str] | None
) -> argparse.Namespace:
    """Parse; block sizes are those of the algorithm, of bd3lm 16 where none is given."""
    arguments = parser.parse_args(words)
    by_blocks = arguments.algo == "bd3lm"
    if arguments.block_size is None:
        arguments.block_size = min(16, arguments.length) if by_blocks else arguments.length
    if not by_blocks and arguments.block_size != arguments.length:
        parser.error(f"--block-size {arguments.block_size}: {arguments.algo} has no blocks")
    if arguments.length % arguments.block_size:
        parser.error(f"--length {arguments.length} is no multiple of --block-size")
    return arguments


def jobs_of(arguments: argparse.Namespace, *, work: str) -> dict[str, Job]:
    """The rows by name, ours in all combinations first, then the reference."""
    shared = {
        key: getattr(arguments, key)
        for key in ("algo", "model", "length", "block_size", "batch_size", "vocab_size",
                    "device", "warmup", "steps")
    }  # fmt: skip
    shared |= {
        "profiled": arguments.profile,
        "peak_size": arguments.peak_size,
        "overrides": tuple(arguments.overrides),
    }
    jobs = {}
    varied = {
        "precision": arguments.precision,
        "attn_backend": arguments.attn_backend,
        "activation_checkpointing": getattr(arguments, "activation_checkpointing", ["none"]),
        "likelihood": getattr(arguments, "likelihood", ["nelbo"]),
    }
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        # The precision, and what else differs between rows.
        told = (v for k, v in chosen.items() if k == "precision" or len(varied[k]) > 1)
        name = ", ".join(told)
        jobs[name] = Job(work=work, side="ours", compiled=arguments.compile, **chosen, **shared)
    if arguments.against is not None:
        # The original runs in bf16 on GPUs, and in float32 on CPUs, where it has no autocast.
        precision = "bf16" if torch.device(arguments.device).type == "cuda" else "float32"
        jobs[f"reference, {precision}"] = Job(
            work=work, side="reference", precision=precision, **shared
        )
    return jobs


def run_rounds(jobs: dict[str, Job], *, rounds: int) -> Iterator[dict[str, Result]]:
    """Time all jobs in turns, so that what else the machine does falls on each alike.

    A job that fails is named and left out.

    Yields:
        The results so far, by name, after each job.
    """
    results: dict[str, Result] = {}
    failed = set()
    for i in range(rounds):
        for name, job in jobs.items():
            if name in failed:
                continue
            print(f"round {i + 1} of {rounds}: {job.work}, {name}", file=sys.stderr, flush=True)
            try:
                result = measure_apart(job)
            except JobFailed as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)
                failed.add(name)
                results.pop(name, None)
                continue
            results[name] = results[name].joined(result) if name in results else result
            yield results


def figures(jobs: dict[str, Job], results: dict[str, Result]) -> list[Figures]:
    """The rows of the table, of the jobs that have a result."""
    reference = next((results[n] for n, job in jobs.items()
                      if is_reference(job, jobs) and n in results), None)  # fmt: skip
    rows = []
    for name, result in results.items():
        job, seconds = jobs[name], statistics.median(result.seconds)
        passes_mb = result.memory_mb - result.state_mb
        times, share, passes_share = None, None, None
        if reference is not None:
            times = statistics.median(reference.seconds) / seconds
            share = result.memory_mb / reference.memory_mb
            passes_share = passes_mb / (reference.memory_mb - reference.state_mb)
        rows.append(
            Figures(
                name=name,
                seconds=seconds,
                tokens_per_second=job.batch_size * job.length / seconds,
                times_reference=times,
                memory_mb=result.memory_mb,
                memory_of_reference=share,
                passes_mb=passes_mb,
                passes_of_reference=passes_share,
                model_tflops=result.flops / 1e12,
                share_of_peak=result.flops / seconds / result.peak_flops,
            )
        )
    return rows


def is_reference(job: Job, jobs: dict[str, Job]) -> bool:
    """Whether others are compared with it: among likelihoods the one draw that is the default."""
    is_likelihood = any(other.likelihood != "nelbo" for other in jobs.values())
    return job.side == "reference" or (is_likelihood and job.likelihood == "nelbo")


def compare(
    arguments: argparse.Namespace, *, work: str, title: str, batches: int | None = None
) -> None:
    """Time all rows, print the table, and write the JSON where wanted (after each row anew).

    Args:
        arguments: of the command line.
        work: of the jobs.
        title: what that is in words.
        batches: also tell the seconds of so many steps.
    """
    where = description(torch.device(arguments.device))
    blocks = f", L = {arguments.block_size}" if arguments.algo == "bd3lm" else ""
    title += (
        f": {arguments.algo}, {arguments.model}, N = {arguments.length}{blocks}, "
        f"batch {arguments.batch_size}, compile={arguments.compile}"
    )
    jobs = jobs_of(arguments, work=work)
    rows, results = [], {}
    for results in run_rounds(jobs, rounds=arguments.rounds):
        rows = figures(jobs, results)
        full = [
            asdict(row) | {"job": asdict(jobs[row.name]), "result": asdict(results[row.name])}
            for row in rows
        ]
        if arguments.json is not None:
            write_json(arguments.json, where | {"title": title, "rows": full})
    print_figures(rows, where, title=title, batches=batches)
    for row in rows:
        print_profile(row.name, results[row.name].profile)


def print_figures(
    rows: list[Figures], where: dict, *, title: str, batches: int | None = None
) -> None:
    """The table of a run."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    headings = ["s per\nstep", "tokens\nper s", "times\nref.", "peak\nMB", "of\nref.",
                "without\nstate", "of\nref.", "model\nTFLOP", "of\npeak"]  # fmt: skip
    if batches is not None:
        headings.insert(1, f"s per\n{batches}")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            f"{row.seconds:.3g}",
            f"{row.tokens_per_second:,.0f}",
            "" if row.times_reference is None else f"{row.times_reference:.2f}",
            f"{row.memory_mb:,.0f}",
            "" if row.memory_of_reference is None else f"{row.memory_of_reference:.2f}",
            f"{row.passes_mb:,.0f}",
            "" if row.passes_of_reference is None else f"{row.passes_of_reference:.2f}",
            f"{row.model_tflops:.3g}",
            f"{row.share_of_peak:.0%}",
        ]
        if batches is not None:
            cells.insert(1, f"{row.seconds * batches:,.3g}")
        table.add_row(row.name, *cells)
    Console(width=WIDTH).print(table)


def print_profile(name: str, profile: dict | None) -> None:
    """What one row's steps made the device do, where they were profiled."""
    if profile is None:
        return
    waits = ", ".join(f"{n:g} {wait}" for wait, n in profile["waits"].items()) or "none"
    console = Console(width=WIDTH)
    console.print(
        f"{name}, per step: {profile['launches']:,.0f} launches, waits: {waits}, "
        f"kernels {profile['busy_ms']:,.1f} ms; the slowest:",
        highlight=False,
    )
    table = Table()
    table.add_column("kernel", overflow="fold")
    for heading in ("ms", "calls"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kernel, milliseconds, calls in profile["slowest"]:
        table.add_row(kernel, f"{milliseconds:.3g}", f"{calls:g}")
    console.print(table)
