"""Statistics of samples: `python scripts/log_sample_stats.py DIRECTORY_OR_FILE [...]`.

Each argument is what `sampling.logdir` was, or a CSV or JSONL file in it; it gets a table of its
own. Cells are read as numbers and never evaluated: they hold text that a model wrote.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any directory
from evaluation.sample_log import SampleRecord, find_sample_files, read_samples
from evaluation.sample_statistics import column_statistics
from utils import print_without_fail

# Column of the files, what the table calls it, decimals.
MEASURED = (
    ("gen_ppl", "generative perplexity", 2),
    ("gen_entropy", "entropy (nats)", 3),
    ("gen_lengths", "length (tokens)", 1),
    ("gen_nfes", "NFEs, every forward pass", 1),
    ("gen_nfes_paper", "NFEs, the paper's count", 1),
)


def sample_table(records: Sequence[SampleRecord], *, title: str) -> Table:
    """One row per measured column; n is how many samples have a value there."""
    table = Table(title=escape(title), title_justify="left")
    for heading in ("", "n", *column_statistics([])):
        table.add_column(heading, justify="right" if heading else "left")
    for column, name, decimals in MEASURED:
        cells = (getattr(record, column) for record in records)
        values = [float(cell) for cell in cells if cell is not None]
        shown = (
            "-" if value is None else f"{value:,.{decimals}f}"
            for value in column_statistics(values).values()
        )
        table.add_row(name, str(len(values)), *shown)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Prints a table per path; returns the exit status, 1 if any path could not be read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="DIRECTORY_OR_FILE")
    status = 0
    console = Console()
    console.width = max(console.width, 100)  # a pipe claims 80 columns
    for path in parser.parse_args(arguments).paths:
        try:
            files = find_sample_files(path)
            records = [record for file in files for record in read_samples(file)]
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        seeds = len({record.seed for record in records})
        title = f"{path} (samples: {len(records)}, seeds: {seeds}, files: {len(files)})"
        console.print(sample_table(records, title=title))
    return status


if __name__ == "__main__":
    print_without_fail()
    raise SystemExit(main())
