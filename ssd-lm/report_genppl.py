"""Generative perplexity of samples: `python ssd-lm/report_genppl.py FILE... --scorer gpt2-large`.

Reads the JSON files of generate_text.py, prints means over all samples with their standard errors
and writes them, with the score of each sample, to a JSON file.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

# Python puts this folder on the path, not the project whose modules are shared.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generate_text import POSITIVE, find_device

from evaluation.generative_perplexity import GenerativePerplexity, ScorerUnavailableError
from utils import json_text, print_without_fail, write_text

COLUMNS = {
    "gen_ppl": "generative perplexity",
    "gen_entropy": "entropy",
    "gen_lengths": "scored tokens",
    "gen_nfes": "forward passes",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="report_genppl.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("samples", nargs="+", type=Path, help="files that generate_text.py wrote")
    add("--scorer", default="gpt2-large", help="Hub id or directory of a causal language model")
    add("--max_length", type=POSITIVE, help="scorer's tokens per text; None: the samples' length")
    add("--batch_size", type=POSITIVE, default=8, help="windows scored together")
    add("--output", type=Path, help="JSON file; None: beside the first one, as NAME.genppl.json")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(arguments)
    try:
        args.device = find_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.output = args.output or args.samples[0].with_suffix(".genppl.json")
    return args


def read_texts(path: Path) -> tuple[int, list[dict[str, Any]]]:
    """The length of a file's samples, and the samples.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: generate_text.py did not write it, or it has no samples yet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        length = int(content["settings"]["length"])
        names = ("index", "text", "nfe")
        samples = [{name: sample[name] for name in names} for sample in content["samples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no file of generate_text.py ({type(error).__name__}: {error})"
        ) from error
    if not samples:
        raise ValueError(f"{path}: holds no samples yet")
    return length, samples


def load_scorer(name: str, *, device: torch.device) -> GenerativePerplexity:
    """The scorer; an error speaks of this program's arguments.

    Raises:
        ScorerUnavailableError: it cannot be loaded, or is no causal language model.
    """
    try:
        return GenerativePerplexity.load(name, device=device)
    except ScorerUnavailableError as error:
        raise ScorerUnavailableError(
            f"--scorer {name}: cannot score samples. Allowed are a causal language model on the "
            "Hugging Face Hub and a directory; without a network, put its config.json, weights "
            "(model.safetensors) and tokenizer files into a directory and give that directory. "
            f"Cause: {error.__cause__}"
        ) from error


def score(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The scores of every sample, files in the order given."""
    files = [(path, *read_texts(path)) for path in args.samples]  # all, before a model is loaded
    scorer = load_scorer(args.scorer, device=args.device)
    rows = []
    for path, length, samples in files:
        texts = [sample["text"] for sample in samples]
        scores = scorer.score(
            texts, max_length=args.max_length or length, batch_size=args.batch_size
        )
        for sample, found in zip(samples, scores, strict=True):
            rows.append(
                {
                    "file": str(path),
                    "index": sample["index"],
                    "gen_ppl": found.gen_ppl,
                    "gen_entropy": found.entropy,
                    "gen_lengths": found.num_tokens,
                    "gen_nfes": sample["nfe"],
                }
            )
    return rows


def finite(value: float | Tensor) -> float | None:
    """The number, or None for NaN and infinity, which JSON does not have."""
    value = float(value)
    return value if math.isfinite(value) else None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of each column, over the samples that have a scored token."""
    scored = [row for row in rows if row["gen_lengths"]]
    result: dict[str, Any] = {"num_samples": len(rows), "num_scored": len(scored)}
    for column in COLUMNS:
        values = torch.tensor([row[column] for row in scored], dtype=torch.float64)
        count = len(values)
        result[column] = finite(values.mean())
        error = values.std() / math.sqrt(count) if count > 1 else math.nan
        result[f"{column}_standard_error"] = finite(error)
    return result


def table_of(result: dict[str, Any], *, title: str) -> Table:
    """The summary, a row per column of the scores."""
    table = Table(title=title)
    for heading in ("", "mean", "standard error"):
        table.add_column(heading, justify="left" if not heading else "right")
    for column, name in COLUMNS.items():
        values = (result[column], result[f"{column}_standard_error"])
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        rows = score(args)
        result = {"scorer": args.scorer} | summary(rows)
        content = json_text(result | {"samples": rows}, indent=2) + "\n"
        write_text(str(args.output), content)
    except (OSError, ValueError) as error:
        print(f"report_genppl.py: error: {error}", file=sys.stderr)
        return 1
    title = f"{result['num_scored']} of {result['num_samples']} samples under {args.scorer}"
    Console().print(table_of(result, title=title))
    print(args.output)
    return 0


if __name__ == "__main__":
    print_without_fail()
    raise SystemExit(main())
