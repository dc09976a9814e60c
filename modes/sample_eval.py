"""Samples of a trained model (`mode=sample_eval`): draw, score, print and write them."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from checkpointing.weights import read_weights
from configuration.sampling_request import SamplingRequest, sampling_request
from corpora.tokenization import mask_index_and_vocab_size
from diffusion import Diffusion
from evaluation.generative_perplexity import (
    GenerativePerplexity,
    SampleScore,
    ScorerUnavailableError,
)
from evaluation.metrics import token_entropy
from evaluation.report import print_table
from evaluation.sample_log import SampleRecord, append_samples, make_logdir
from models.inference import cast_matrices
from models.masks import AttentionPattern
from modes.starting_weights import load_model, tokenizer_of
from sampling.base import SamplerOutput
from sampling.live import SamplingDisplay
from sampling.options import SamplingOptions, suit_vocabulary
from sampling.prompts import CanvasRow, stack
from sampling.trace import Trace
from training.manifest import config_hash
from utils import (
    absolute_path,
    duration,
    get_logger,
    in_batch_job,
    keep_freed_memory_for_sampling,
    process_rank,
    resolve_device,
    write_text,
)

logger = get_logger(__name__)


def sample_eval(config: DictConfig) -> str | None:
    """Sample, print, score and write; a batch is on disk before the next one begins.

    Processes (under srun or torchrun) share the batches out; a row does not depend on which of
    them draws it.

    Returns:
        The path of the CSV file in `sampling.logdir`; `samples.jsonl` beside it holds more. None:
        there were fewer batches than processes, and none for this one.

    Raises:
        ScorerUnavailableError: after the samples are written, if they could not be scored.
    """
    rank, _ = process_rank()
    request = sampling_request(config)
    logdir = absolute_path(request.logdir)
    make_logdir(logdir)
    weights = read_weights(request.checkpoint)
    tokenizer = tokenizer_of(config, weights)
    mask_index, vocab_size = mask_index_and_vocab_size(tokenizer)
    # What may fail for a typing error comes before the model is made.
    rows = request.canvas_rows(tokenizer, mask_index=mask_index)
    options = dataclasses.replace(request.options, decode=tokenizer.decode)
    options = suit_vocabulary(options, vocab_size=vocab_size)
    device = resolve_device(request.accelerator)
    model = load_model(config, tokenizer, weights).to(device)
    del weights
    make_fast(model, request)
    scorer = load_scorer(request, device)
    records: list[SampleRecord] = []
    path = None
    began = time.monotonic()
    for start, batch, output in draw_batches(request, model, tokenizer, rows, options=options):
        fresh = to_records(request, tokenizer, batch, output, first_row=start, scorer=scorer)
        path = append_samples(logdir, fresh)
        for number, record in enumerate(fresh, start=start + 1):
            Console().print(Panel(Text(record.samples), title=f"sample {number}"))
        records += fresh
    warn_of_rejected(request, records)
    if rank == 0:
        print_table("Samples", summary(records, seconds=time.monotonic() - began))
    logger.info("Samples are in %s", logdir)
    if isinstance(scorer, OSError):
        raise scorer
    return path


def load_scorer(
    request: SamplingRequest, device: torch.device
) -> GenerativePerplexity | OSError | None:
    """The model that scores samples; None where the user wants none, the error where it fails."""
    if request.scorer is None:
        return None
    try:
        return GenerativePerplexity.load(request.scorer, device=device)
    except ScorerUnavailableError as error:
        logger.error("Samples will be written without generative perplexity. %s", error)
        return error


def warn_of_rejected(request: SamplingRequest, records: Sequence[SampleRecord]) -> None:
    """Say how many samples still have too little entropy."""
    number = sum(not record.extra["accepted"] for record in records)
    if number:
        logger.warning(
            "%d of %d samples have less than sampling.min_entropy=%s nats in 256 tokens after "
            "sampling.max_retries=%d further attempts; `accepted` in samples.jsonl says which",
            number,
            len(records),
            request.options.min_entropy,
            request.max_retries,
        )


def draw_batches(
    request: SamplingRequest,
    model: Diffusion,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[CanvasRow],
    *,
    options: SamplingOptions,
) -> Iterator[tuple[int, Sequence[CanvasRow], SamplerOutput]]:
    """This process's share of the batches: number of the first row, what was given, the output.

    Shows how far it is, and keeps the page of `sampling.trace` up to date.
    """
    rank, world_size = process_rank()
    size = request.batch_size
    batches = {i: rows[i : i + size] for i in range(rank * size, len(rows), world_size * size)}
    trace = None
    if request.trace is not None:
        stem, extension = os.path.splitext(request.trace)
        trace_path = f"{stem}.rank{rank}{extension}" if rank else request.trace
        title = f"{request.title}: how the text came about"
        trace = Trace(title=title, decode=tokenizer.decode)
    display = SamplingDisplay(
        [row for batch in batches.values() for row in batch],
        mask_index=model.mask_index,
        decode=tokenizer.decode,
        shows_rows=request.live,
        is_quiet=rank > 0,
    )
    with display:
        for number, (start, batch) in enumerate(batches.items(), start=1):
            on_step, began = display.begin(batch), time.monotonic()
            output = draw(
                request, model, batch, options=options, first_row=start, on_step=on_step
            )
            if in_batch_job():
                logger.info(
                    "batch %d of %d: %d samples in %s",
                    number, len(batches), len(batch), duration(time.monotonic() - began),
                )  # fmt: skip
            if trace is not None and trace.add(output, first_row=start):
                write_text(trace_path, trace.page())
            yield start, batch, output


def make_fast(model: Diffusion, request: SamplingRequest) -> None:
    """Prepare a model that only samples from now on, as `sampling.compile` and the precision say.

    Done once: a network that is compiled anew for each batch would be slower than one that is not.
    """
    if request.is_bf16:
        cast_matrices(model.backbone, torch.bfloat16, packs=request.compile is not True)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=request.is_bf16):
        model.denoiser = model.denoiser.for_sampling(compiled=request.compile)
    keep_freed_memory_for_sampling()  # the float32 weights are gone


def draw(
    request: SamplingRequest,
    model: Diffusion,
    batch: Sequence[CanvasRow],
    *,
    options: SamplingOptions,
    first_row: int,
    on_step: Callable[[Tensor], None] | None = None,
) -> SamplerOutput:
    """Complete a batch of rows in the precision of `trainer.precision`."""
    # Beyond its context mdlm goes on by half a window, which is its block there.
    in_blocks = model.pattern is AttentionPattern.BLOCK_DIFFUSION
    is_long = max(row.limit for row in batch) > model.block_size and not in_blocks
    unit = max(1, model.block_size // 2) if is_long else model.block_size
    canvas, limits = stack(
        batch, block_size=unit, mask_index=model.mask_index, device=model.device
    )
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=request.is_bf16):
        return model.generate(
            canvas,
            limits=limits,
            options=options,
            seed=request.seed,
            first_row=first_row,
            max_retries=request.max_retries,
            on_step=on_step,
        )


def to_records(
    request: SamplingRequest,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[CanvasRow],
    output: SamplerOutput,
    *,
    first_row: int,
    scorer: GenerativePerplexity | OSError | None,
) -> list[SampleRecord]:
    """One record per sampled row, scored where there is a scorer."""
    rows = [t[:n] for t, n in zip(output.tokens.cpu(), output.lengths.tolist(), strict=True)]
    texts = [tokenizer.decode(row) for row in rows]
    scores: Sequence[SampleScore | None] = [None] * len(rows)
    if isinstance(scorer, GenerativePerplexity):
        scores = scorer.score(
            texts, max_length=request.length, batch_size=request.scorer_batch_size
        )
    digest = config_hash(request.run_config)
    return [
        SampleRecord(
            samples=texts[i],
            gen_ppl=scores[i].gen_ppl if scores[i] else None,
            gen_entropy=scores[i].entropy if scores[i] else token_entropy(rows[i]),
            gen_nfes=int(output.num_forward_passes[i]),
            gen_nfes_paper=int(output.num_denoising_passes[i]),
            gen_lengths=len(rows[i]),
            seed=request.seed,
            extra={
                "row": first_row + i,
                "new_tokens": int((output.revealed_at[i, : len(rows[i])] > 0).sum()),
                "accepted": bool(output.accepted[i]),
                "source": batch[i].source,
                "checkpoint": request.checkpoint,
                "config_hash": digest,
            },
        )
        for i in range(len(rows))
    ]


def summary(records: Sequence[SampleRecord], *, seconds: float) -> dict[str, float | int]:
    """Means over the samples that have a value, and how fast they came."""
    # Without BOS, prompts and what surrounds gaps, for which nobody waits.
    num_new = sum(r.extra["new_tokens"] for r in records)
    values: dict[str, float | int] = {"samples": len(records), "new tokens": num_new}
    # A sample without a scored token has no perplexity: `values` says None where that is NaN.
    rows = [record.values() for record in records]
    for name in ("gen_ppl", "gen_entropy", "gen_lengths", "gen_nfes", "gen_nfes_paper"):
        known = [row[name] for row in rows if row[name] is not None]
        if known:
            values[f"mean {name}"] = sum(known) / len(known)
    if num_passes := sum(r.gen_nfes for r in records):
        values["new tokens per pass"] = num_new / num_passes
    values["new tokens per second"] = num_new / seconds
    return values
