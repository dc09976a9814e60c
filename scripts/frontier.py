"""Sample one checkpoint over a grid of sampling keys, and score each point of it.

    python -m scripts.frontier --out FOLDER eval.checkpoint_path=CHECKPOINT [key=value ...] \
      sampling.temperature=0.8,0.9,1.0 sampling.tokens_per_step=1,2,4

Takes the overrides of `main.py`; a key under `sampling`, or `algo.T`, that has several values is an
axis of the grid. FOLDER gets `points.jsonl`, the picture `frontier.png` and the texts. Points that
it has already are not measured again, and those of further grids come into the same picture.
"""

import argparse
import contextlib
import dataclasses
import datetime
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from checkpointing.weights import read_weights
from corpora.tokenization import mask_index_and_vocab_size
from diffusion import Diffusion
from evaluation.frontier import (
    Point,
    comparable,
    draw_frontier,
    frontier_table,
    read_points,
    setting_text,
    with_error,
    write_points,
)
from evaluation.generative_perplexity import GenerativePerplexity
from evaluation.sample_log import SampleRecord, append_samples
from modes.sample_eval import (
    draw_batches,
    load_scorer,
    make_fast,
    summary,
    to_records,
    warn_of_rejected,
)
from modes.starting_weights import load_model, tokenizer_of
from sampling.options import suit_vocabulary
from sampling.prompts import CanvasRow
from scripts.composing import USER_ERRORS
from scripts.frontier_grid import Job, plan
from scripts.log_sample_stats import column_statistics
from training.manifest import device_name
from training.progress import quiet_known_noise
from utils import (
    duration,
    file_lock,
    get_logger,
    keep_freed_memory,
    lock_holder,
    one_line,
    print_without_fail,
    process_rank,
    resolve_device,
)

logger = get_logger(__name__)

POINTS, PICTURE = "points.jsonl", "frontier.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the table; errors end the program with a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="as main.py takes them; "
                        "several values, separated by commas, make an axis")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                        help="points.jsonl, frontier.png and samples/; what is there is kept")
    args = parser.parse_intermixed_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
    )
    quiet_known_noise()
    keep_freed_memory()
    try:
        with sole_user(args.out):
            run(args.overrides, args.out)
    except USER_ERRORS as error:
        sys.exit(one_line(error))
    except KeyboardInterrupt:
        logger.warning("Stopped by Ctrl-C; the same command goes on with what is missing")
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made where it is missing.

    Raises:
        ValueError: another process has it, or there are several of this one.
    """
    if process_rank()[1] > 1:
        raise ValueError(
            f"{process_rank()[1]} processes: allowed is 1; start one command for each device, "
            "with a folder and a part of the grid of its own"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        with file_lock(lock, timeout=0):
            yield
    except filelock.Timeout:
        raise ValueError(f"--out {folder}: {lock_holder(lock)} is writing there") from None


def run(overrides: Sequence[str], folder: Path) -> None:
    """Measures the points of a grid that the folder lacks; the picture grows with each.

    Raises:
        ValueError: a key or a value that is not allowed at some point, no scorer, or points of
            another checkpoint, before anything is loaded.
        OSError: a file cannot be read or written, or the scorer cannot be loaded.
    """
    jobs = plan(overrides)
    file = folder / POINTS
    points = read_points(str(file)) if file.exists() else []
    check_checkpoint(points, jobs[0], folder=folder)
    there = {point.key for point in points}
    missing = list({job.key: job for job in jobs if job.key not in there}.values())
    logger.info("%d of %d points are measured already", len(jobs) - len(missing), len(jobs))
    for point in measured(missing, folder=folder):
        points.append(point)
        write_points(str(file), points)
        draw_frontier(shown(points, jobs), folder / PICTURE, title=title_of(jobs[0]))
    if not missing:
        draw_frontier(shown(points, jobs), folder / PICTURE, title=title_of(jobs[0]))
    console = Console()
    console.width = max(console.width, 120)  # a pipe claims 80 columns
    console.print(frontier_table(points, title=title_of(jobs[0])))
    if left_out := len(points) - len(shown(points, jobs)):
        logger.info("%d points of other scorers or lengths, or of settings that were measured "
                    "anew, are in the table and not in the picture", left_out)  # fmt: skip
    logger.info("Points, picture and texts are in %s", folder)


def check_checkpoint(points: Sequence[Point], job: Job, *, folder: Path) -> None:
    """Raises ValueError: the folder has points of another checkpoint."""
    name, digest = job.known["checkpoint"], job.known["checkpoint_hash"]
    for point in points:
        if (point.checkpoint_hash or point.checkpoint) != (digest or name):
            raise ValueError(
                f"eval.checkpoint_path={name} ({digest or 'on the Hub'}): allowed with --out "
                f"{folder} is {point.checkpoint} ({point.checkpoint_hash or 'on the Hub'}), of "
                "which its points are; another checkpoint needs another folder"
            )


# --- measuring --------------------------------------------------------------------------------


def measured(jobs: Sequence[Job], *, folder: Path) -> Iterator[Point]:
    """Loads scorer and model, and yields a point for each job as soon as it is measured.

    Raises:
        ValueError, OSError: weights, tokenizer or scorer cannot be loaded, or prompts do not fit.
    """
    if not jobs:
        return
    config, request = jobs[0].config, jobs[0].request
    weights = read_weights(request.checkpoint)
    tokenizer = tokenizer_of(config, weights)
    mask_index, _ = mask_index_and_vocab_size(tokenizer)
    rows = [job.request.canvas_rows(tokenizer, mask_index=mask_index) for job in jobs]
    device = resolve_device(request.accelerator)
    scorer = load_scorer(request, device)
    if not isinstance(scorer, GenerativePerplexity):
        raise scorer
    model = load_model(config, tokenizer, weights).to(device)
    del weights
    make_fast(model, request)
    began = time.monotonic()
    for number, job in enumerate(jobs, start=1):
        place, name = f"point {number} of {len(jobs)}", setting_text(job.grid) or "one setting"
        passed = time.monotonic() - began
        rest = passed / (number - 1) * (len(jobs) - number + 1) if number > 1 else None
        left = "" if rest is None else f", about {duration(rest)} left"
        logger.info("%s: %s%s", place, name, left)
        records, seconds = draw_texts(job, rows[number - 1], model, tokenizer, scorer)
        warn_of_rejected(job.request, records)
        point = make_point(job, records, seconds=seconds, device=device)
        shutil.rmtree(folder / point.samples, ignore_errors=True)  # of a run stopped right here
        append_samples(str(folder / point.samples), records)
        yield point
        logger.info(
            "%s: generative perplexity %s, entropy %s, in %s", place,
            with_error(point.gen_ppl, point.gen_ppl_error),
            with_error(point.entropy, point.entropy_error),
            duration(time.monotonic() - began - passed),
        )  # fmt: skip


def draw_texts(
    job: Job,
    rows: Sequence[CanvasRow],
    model: Diffusion,
    tokenizer: PreTrainedTokenizerBase,
    scorer: GenerativePerplexity,
) -> tuple[list[SampleRecord], float]:
    """The texts of a point with their scores, and the seconds that drawing them took."""
    options = dataclasses.replace(job.request.options, decode=tokenizer.decode)
    options = suit_vocabulary(options, vocab_size=model.backbone.config.vocab_size)
    records, scoring, began = [], 0.0, time.monotonic()
    for start, batch, output in draw_batches(job.request, model, tokenizer, rows, options=options):
        drawn = time.monotonic()
        records += to_records(
            job.request, tokenizer, batch, output, first_row=start, scorer=scorer
        )
        scoring += time.monotonic() - drawn
    return records, time.monotonic() - began - scoring


def make_point(
    job: Job, records: Sequence[SampleRecord], *, seconds: float, device: torch.device
) -> Point:
    """The means of texts, and their errors."""
    means = summary(records, seconds=seconds)
    values = [record.values() for record in records]
    ppl, entropy = (
        column_statistics([row[name] for row in values if row[name] is not None])
        for name in ("gen_ppl", "gen_entropy")
    )
    return Point(
        key=job.key,
        grid=job.grid,
        settings=job.settings,
        **job.known,
        length=job.request.length,
        seed=job.request.seed,
        num_texts=len(records),
        gen_ppl=ppl["mean"],
        gen_ppl_error=ppl["std. error"],
        entropy=entropy["mean"],
        entropy_error=entropy["std. error"],
        tokens_per_pass=means.get("new tokens per pass"),
        tokens_per_second=means["new tokens per second"],
        samples=f"samples/{job.key}",
        machine={
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
        },
    )


# --- showing ----------------------------------------------------------------------------------


def shown(points: Sequence[Point], jobs: Sequence[Job]) -> list[Point]:
    """What may be compared with this run's points, which take precedence and have its axes."""
    grids = {job.key: job.grid for job in jobs}
    ours = [dataclasses.replace(p, grid=grids[p.key]) for p in points if p.key in grids]
    others = [point for point in points if point.key not in grids]
    return comparable([*others, *ours], to=ours[0])


def title_of(job: Job) -> str:
    """What is shown: the model, its file and who scores."""
    checkpoint, scorer = (os.path.basename(job.known[name]) for name in ("checkpoint", "scorer"))
    length = job.request.length
    return f"{checkpoint}: {job.request.title}, {length} tokens, scored by {scorer}"


if __name__ == "__main__":
    print_without_fail()
    main()
