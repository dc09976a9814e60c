"""Samples beside real text: `python -m scripts.compare_samples SAMPLES REFERENCE [--json FILE]`.

SAMPLES is what `sampling.logdir` was, or a file in it. REFERENCE is files of text or of other
samples, or the overrides of a data set, such as `data=wikitext2 model.length=256`, whose
validation rows are decoded. docs/sampling.md says what each number is.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from configuration.data_request import data_request
from corpora.lines import read_json_lines
from corpora.local_files import DOCUMENT_MODES, find_files, read_documents
from corpora.row_datasets import PackedRows
from corpora.tokenization import load_tokenizer
from dataloader import get_dataloaders, get_tokenizer
from evaluation.fair_sides import Sides, fair_sides
from evaluation.generative_perplexity import GenerativePerplexity
from evaluation.mauve_score import ENOUGH_TEXTS, Featurizer, import_mauve, mauve
from evaluation.metrics import token_entropy
from evaluation.progress import shown
from evaluation.sample_log import find_sample_files, read_samples
from evaluation.sample_statistics import column_statistics, distinct_share, repeated_share
from scripts.composing import USER_ERRORS, compose
from training.progress import quiet_known_noise
from utils import json_text, one_line, print_without_fail, resolve_device, write_text

Item = TypeVar("Item")
Value = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: a measure of the samples beside that of the reference."""

    key: str
    name: str
    decimals: int = 4
    samples: Value | None = None
    reference: Value | None = None
    cause: str | None = None  # why there is no value


class DecodedRows(Sequence[str]):
    """The text of packed rows, as the samples of a model of these rows are decoded."""

    def __init__(self, rows: PackedRows, tokenizer: PreTrainedTokenizerBase):
        self._rows, self._tokenizer = rows, tokenizer

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        row = self._rows[index]
        return self._tokenizer.decode(row["input_ids"][row["attention_mask"].bool()])


def batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


# --- the two sides ---------------------------------------------------------------------------


def read_texts(path: str, *, document: str, key: str) -> tuple[list[str], bool]:
    """The texts of a file or directory, and whether they are samples that this project wrote."""
    if files := sample_files(path):
        return [record.samples for file in files for record in read_samples(file)], True
    documents = read_documents(find_files(path, key=key, default_format="text"), document, "text")
    return [record["text"] for record in documents if record["text"].strip()], False


def sample_files(path: str) -> list[Path]:
    """The files of samples that a path stands for; none where it is another kind of text."""
    local = Path(path)
    if local.is_dir():
        has_samples = any(local.glob("samples*.csv")) or any(local.glob("samples*.jsonl"))
        return find_sample_files(local) if has_samples else []
    if local.suffix == ".jsonl" and local.is_file():
        first = next(read_json_lines(path), (path, {}))[1]
        return [local] if "samples" in first else []
    return [local] if local.suffix == ".csv" else []


def read_rows(overrides: Sequence[str]) -> tuple[DecodedRows, PreTrainedTokenizerBase]:
    """The validation rows of a data set and their tokenizer, for the overrides of `main.py`."""
    config = compose(overrides)
    data = dataclasses.replace(data_request(config), eval_batch_size=1, num_workers=0)
    tokenizer = get_tokenizer(data)
    _, loader = get_dataloaders(data, tokenizer, skip_train=True)
    return DecodedRows(loader.dataset, tokenizer), tokenizer


def counting_tokenizer(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer that counts and cuts, and its name: `--tokenizer`, or else a model's.

    Raises:
        ValueError: none can be loaded.
    """
    names = [args.tokenizer] if args.tokenizer else [args.scorer, args.featurizer]
    causes = []
    for name in dict.fromkeys(name for name in names if name != "null"):
        try:
            return load_tokenizer(name), name
        except ValueError as error:
            causes.append(f"{name}: {error.__cause__ or error}")
    raise ValueError(
        f"--tokenizer={args.tokenizer or 'null'} leaves nothing to count tokens with and to cut "
        "both sides to one length. Allowed: the tokenizer of the model that drew the samples "
        "(text8, bytes, a folder or a Hub id); by default that of --scorer or --featurizer. "
        f"Cause: {'; '.join(causes) or 'no name was given'}"
    )


# --- measures --------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> Value:
    """Mean over texts with its standard error; NaN is no value."""
    known = column_statistics([value for value in values if value == value])
    return {"value": known["mean"], "std_error": known["std. error"]}


def token_rows(sides: Sides) -> list[Row]:
    """What needs no network."""

    def row(key: str, name: str, measure: Callable[[list[list[int]]], Value], **how: Any) -> Row:
        values = {"samples": measure(sides.samples), "reference": measure(sides.reference)}
        return Row(key=key, name=name, **values, **how)

    return [
        row("token_entropy", "token entropy of a text (nats)",
            lambda side: mean(token_entropy(torch.tensor(ids)) for ids in side)),
        row("unigram_entropy", "unigram entropy of all texts (nats)",
            lambda side: {"value": token_entropy(torch.tensor([*itertools.chain(*side)]))}),
        *(
            row(f"distinct_{n}", f"distinct-{n} of all texts",
                lambda side, n=n: {"value": distinct_share(side, n=n)})
            for n in range(1, 5)
        ),
        row("repeated_4", "repeated 4-grams of a text",
            lambda side: mean(repeated_share(ids, n=4) for ids in side)),
        row("texts", "texts", lambda side: {"value": len(side)}, decimals=0),
        row("tokens", "tokens", lambda side: {"value": sum(map(len, side))}, decimals=0),
        row("length", "tokens per text", lambda side: mean(map(len, side)), decimals=1),
    ]  # fmt: skip


def perplexity_row(sides: Sides, args: argparse.Namespace, device: torch.device) -> Row:
    """Generative perplexity: the mean over texts, as `mode=sample_eval` reports it."""
    scorer = GenerativePerplexity.load(args.scorer, device=device, key="--scorer")
    values = {}
    for name, ids in (("samples", sides.samples), ("reference", sides.reference)):
        scores = [
            score.gen_ppl
            for batch in shown(batches(sides.texts(ids), args.batch_size), title=f"Scoring {name}")
            for score in scorer.score(batch, max_length=sys.maxsize, batch_size=args.batch_size)
        ]
        values[name] = mean(scores)
    return Row(**perplexity_name(args), **values)


def mauve_row(sides: Sides, args: argparse.Namespace, device: torch.device) -> Row:
    """MAUVE of samples and reference; the reference's own is that of further texts of it."""
    import_mauve()  # before a network is loaded for nothing
    featurizer = Featurizer.load(args.featurizer, device=device, key="--featurizer")
    features = {}
    for name, ids in (
        ("samples", sides.samples),
        ("reference", sides.reference),
        ("further reference", sides.second),
    ):
        parts = batches(sides.texts(ids), args.batch_size)
        title = f"Featurising {name}"
        features[name] = [featurizer.features(part) for part in shown(parts, title=title)]
    reference = np.concatenate(features.pop("reference"))
    found = [
        mauve(np.concatenate(parts), reference, seeds=range(args.seeds)) if parts else None
        for parts in features.values()
    ]
    values = [
        score and {"value": score.mean, "min": min(score.values), "max": max(score.values)}
        for score in found
    ]
    return Row(**mauve_name(args), samples=values[0], reference=values[1])


def mauve_notes(sides: Sides) -> list[str]:
    """What to know beside its value."""
    size = len(sides.reference)
    notes = []
    if not sides.second:
        notes.append(f"MAUVE of the reference itself needs {2 * size:,} texts of it")
    if size < ENOUGH_TEXTS:
        notes.append(f"MAUVE of fewer than {ENOUGH_TEXTS:,} texts depends much on their number")
    return notes


def perplexity_name(args: argparse.Namespace) -> dict[str, Any]:
    return {"key": "gen_ppl", "name": f"generative perplexity ({args.scorer})", "decimals": 2}


def mauve_name(args: argparse.Namespace) -> dict[str, Any]:
    return {"key": "mauve", "name": f"MAUVE ({args.featurizer}, {args.seeds} seeds of k-means)"}


def network_rows(sides: Sides, args: argparse.Namespace) -> list[Row]:
    """What needs a network; one that cannot be had leaves its row without values."""
    device = resolve_device(args.device)
    rows = []
    for make, named, option in (
        (mauve_row, mauve_name, "featurizer"), (perplexity_row, perplexity_name, "scorer")
    ):  # fmt: skip
        if getattr(args, option) == "null":
            continue
        try:
            rows.append(make(sides, args, device))
        except USER_ERRORS as error:
            rows.append(Row(**named(args), cause=one_line(error)))
    return rows


# --- the command -----------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Reads, makes both sides fair, measures; returns the rows and what they were measured with."""
    samples, keeps_special = read_texts(args.samples, document=args.document, key="SAMPLES")
    tokenizer = None
    if any(part.startswith("data=") for part in args.reference):
        reference, tokenizer = read_rows(args.reference)
        name = tokenizer.name_or_path or "the data set's tokenizer"
    else:
        reference = []
        for path in args.reference:
            texts, is_samples = read_texts(path, document=args.document, key="REFERENCE")
            keeps_special &= is_samples
            reference += texts
    if args.tokenizer is not None or tokenizer is None:
        tokenizer, name = counting_tokenizer(args)
    sides = fair_sides(
        samples, reference, tokenizer=tokenizer, keeps_special=keeps_special,
        num=args.num_texts, exact=args.length,
    )  # fmt: skip
    rows = network_rows(sides, args) + token_rows(sides)
    notes = [*sides.notes, f"tokens are those of {name}"]
    if args.featurizer != "null":
        notes += mauve_notes(sides)
    where = {
        "samples": args.samples, "reference": args.reference, "tokenizer": name,
        "featurizer": args.featurizer, "scorer": args.scorer, "length": sides.length,
        "notes": notes,
    }  # fmt: skip
    return rows, where


def cell(value: Value | None, *, decimals: int) -> str:
    if value is None or value["value"] is None:
        return "-"
    text = f"{value['value']:,.{decimals}f}"
    if value.get("std_error") is not None:
        text += f" ± {value['std_error']:,.{decimals}f}"
    if "min" in value:
        text += f" ({value['min']:.{decimals}f} to {value['max']:.{decimals}f})"
    return text


def difference(row: Row) -> str:
    if not (row.samples and row.reference) or row.key == "texts":
        return ""
    a, b = row.samples["value"], row.reference["value"]
    return "" if a is None or b is None else f"{a - b:+,.{row.decimals}f}"


def print_rows(rows: Sequence[Row], where: dict[str, Any]) -> None:
    """The table, and below it what was done."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe claims 80 columns
    title = f"{where['samples']} beside {' '.join(where['reference'])}"
    table = Table(title=escape(title), title_justify="left")
    for heading in ("", "samples", "reference", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        cells = (cell(value, decimals=row.decimals) for value in (row.samples, row.reference))
        shown_cells = (*cells, difference(row)) if row.cause is None else ("not computed", "", "")
        table.add_row(escape(row.name), *shown_cells)
    console.print(table)
    for note in where["notes"]:
        print(f"- {note}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", metavar="SAMPLES", help="a directory or file of samples")
    parser.add_argument(
        "reference", nargs="+", metavar="REFERENCE",
        help="files of text or samples, or data=NAME and further overrides of main.py",
    )  # fmt: skip
    parser.add_argument("--featurizer", default="gpt2-large", help="of MAUVE; null: no MAUVE")
    parser.add_argument("--scorer", default="gpt2-large", help="null: no generative perplexity")
    parser.add_argument("--tokenizer", help="counts and cuts; by default the data's or a model's")
    parser.add_argument("--length", type=positive, help="tokens of every text")
    parser.add_argument("--num-texts", type=positive, help="at most so many on each side")
    parser.add_argument("--document", choices=DOCUMENT_MODES, default="file",
                        help="what one text of a .txt file is")  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=5, help="of k-means, for MAUVE")
    parser.add_argument("--batch-size", type=positive, default=8, help="texts per forward pass")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where anything could not be computed."""
    args = make_parser().parse_intermixed_args(arguments)
    quiet_known_noise()
    try:
        rows, where = compare(args)
        print_rows(rows, where)
        if args.json is not None:
            record = where | {"rows": {row.key: dataclasses.asdict(row) for row in rows}}
            write_text(args.json, json_text(record, indent=2) + "\n")
    except USER_ERRORS as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    failed = [row for row in rows if row.cause is not None]
    for row in failed:
        print(f"error: {row.name} was not computed: {row.cause}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    print_without_fail()
    raise SystemExit(main())
