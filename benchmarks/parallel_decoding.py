"""What revealing several tokens per pass costs: tokens per pass beside generative perplexity.

    python -m benchmarks.parallel_decoding eval.checkpoint_path=CHECKPOINT \
      eval.gen_ppl_eval_model_name_or_path=SCORER --json FILE --picture FILE [key=value ...]

Takes the overrides of `main.py`. The same rows are sampled with `sampling.tokens_per_step` and
with `sampling.confidence_threshold` at several values, in one run. `benchmarks.train_scorer` makes
a scorer where the Hub is out of reach.
"""

import argparse
import dataclasses
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import description
from benchmarks.steps import compose
from configuration import validate
from configuration.data_request import data_request
from configuration.sampling_request import SamplingRequest, sampling_request
from dataloader import get_tokenizer
from diffusion import Diffusion
from evaluation.generative_perplexity import GenerativePerplexity
from modes.sample_eval import draw_batches, load_scorer, make_fast, to_records
from modes.starting_weights import load_model
from sampling.options import SamplingOptions, suit_vocabulary
from utils import json_text, keep_freed_memory, resolve_device

TOKENS_PER_STEP = (1, 2, 4, 8, 16)
THRESHOLDS = (0.9, 0.5, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of the table; means over the samples."""

    setting: str
    tokens_per_pass: float
    tokens_per_second: float
    gen_ppl: float
    entropy: float


def settings(options: SamplingOptions, *, block_size: int) -> dict[str, SamplingOptions]:
    """What is compared, by name; more tokens at once than a block has are the whole block."""
    found = {
        f"tokens_per_step={n}": dataclasses.replace(options, tokens_per_step=n)
        for n in TOKENS_PER_STEP
        if n <= block_size
    }
    return found | {
        f"confidence_threshold={p}": dataclasses.replace(options, confidence_threshold=p)
        for p in THRESHOLDS
    }


def measure(
    request: SamplingRequest,
    model: Diffusion,
    scorer: GenerativePerplexity,
    *,
    tokenizer: PreTrainedTokenizerBase,
    setting: str,
    options: SamplingOptions,
) -> Figures:
    """Sample every row of the request in one way, and score it."""
    rows = request.canvas_rows(tokenizer, mask_index=model.mask_index)
    began, records, scoring = time.monotonic(), [], 0.0
    for start, batch, output in draw_batches(request, model, tokenizer, rows, options=options):
        drawn = time.monotonic()
        records += to_records(request, tokenizer, batch, output, first_row=start, scorer=scorer)
        scoring += time.monotonic() - drawn
    seconds = time.monotonic() - began - scoring
    tokens = sum(r.gen_lengths for r in records)
    return Figures(
        setting=setting,
        tokens_per_pass=tokens / sum(r.gen_nfes for r in records),
        tokens_per_second=tokens / seconds,
        gen_ppl=sum(r.gen_ppl for r in records) / len(records),
        entropy=sum(r.gen_entropy for r in records) / len(records),
    )


def print_figures(rows: list[Figures], where: dict, *, title: str) -> None:
    """The table of a run."""
    caption = ", ".join(f"{key} {value}" for key, value in where.items() if key != "command")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for heading in ("setting", "tokens per pass", "tokens/s", "gen. perplexity", "entropy"):
        is_name = heading == "setting"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        figures = (row.tokens_per_pass, row.tokens_per_second, row.gen_ppl, row.entropy)
        table.add_row(row.setting, *(f"{figure:,.2f}" for figure in figures))
    Console().print(table)


def draw_picture(rows: list[Figures], path: Path, *, title: str) -> None:
    """Generative perplexity over tokens per pass, a line for each way, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, color in (("tokens_per_step", "#2f5597"), ("confidence_threshold", "#c55a11")):
        points = [row for row in rows if row.setting.startswith(name)]
        points.sort(key=lambda row: row.tokens_per_pass)
        x, y = [r.tokens_per_pass for r in points], [r.gen_ppl for r in points]
        axes.plot(x, y, "o-", color=color, label=name)
        for row in points:
            axes.annotate(
                row.setting.split("=")[1], (row.tokens_per_pass, row.gen_ppl),
                textcoords="offset points", xytext=(5, 5), fontsize=8, color=color,
            )  # fmt: skip
    axes.set(title=title, xlabel="tokens per forward pass", ylabel="generative perplexity")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Measure, print the table, write JSON and a picture where wanted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="as main.py takes them")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--picture", type=Path, help="draw them into this PNG")
    arguments = parser.parse_intermixed_args()
    keep_freed_memory()
    config = compose(["mode=sample_eval", "then=[]", *arguments.overrides])
    validate(config)
    device = resolve_device(config.trainer.accelerator)
    request = sampling_request(config)
    scorer = load_scorer(request, device)
    if not isinstance(scorer, GenerativePerplexity):
        parser.error(f"no scorer: {scorer or 'eval.gen_ppl_eval_model_name_or_path is null'}")
    tokenizer = get_tokenizer(data_request(config))
    model = load_model(config, tokenizer).to(device)
    make_fast(model, request)
    options = dataclasses.replace(request.options, decode=tokenizer.decode)
    options = suit_vocabulary(options, vocab_size=model.backbone.config.vocab_size)
    rows = [
        measure(request, model, scorer, tokenizer=tokenizer, setting=name, options=each)
        for name, each in settings(options, block_size=config.block_size).items()
    ]
    title = f"{config.algo.name}, block size {config.block_size}, N = {config.model.length}"
    where = description(device) | {"scorer": os.path.basename(scorer.model.name_or_path)}
    print_figures(rows, where, title=title)
    if arguments.picture is not None:
        draw_picture(rows, arguments.picture, title=title)
    if arguments.json is not None:
        record = where | {"title": title, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json_text(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
