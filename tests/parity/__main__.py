"""`python -m tests.parity FOLDER`: compare with the original's results, file by file.

FOLDER holds files as `../shared/golden/README.md` describes them; those that are present are
checked. The exit status is 1 if any comparison fails, and 2 if there was nothing to compare.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.parity.arithmetic import clip_rows, ema_rows, noise_rows
from tests.parity.network import backbone_rows, loss_rows
from tests.parity.published import hub_rows, lightning_rows
from tests.parity.rows import Row
from tests.parity.scoring import score_rows, scorer_rows
from tests.parity.ssd_lm import ssd_rows
from tests.parity.text import data_rows, detokenizer_rows

# In the order of the table.
CHECKS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "noise_schedules.safetensors": noise_rows,
    "ema.safetensors": ema_rows,
    "clip_search.safetensors": clip_rows,
    "backbone_*.safetensors": backbone_rows,
    "loss_*.safetensors": loss_rows,
    "data.json": data_rows,
    "detokenizers.json": detokenizer_rows,
    "gen_ppl.json": score_rows,
    "tiny-gpt2": scorer_rows,
    "hub/*": hub_rows,
    "ssd_lm": ssd_rows,
    "lightning/*.ckpt": lightning_rows,
}
STYLES = {"ok": "green", "NOT OK": "bold red", "not yet": "yellow"}


def folder_rows(folder: Path) -> Iterator[Row]:
    """The rows of every file that is there, known kinds only."""
    for pattern, check in CHECKS.items():
        for path in sorted(folder.glob(pattern)):
            name = str(path.relative_to(folder))
            try:
                yield from check(path)
            except Exception as error:  # a file that cannot be checked must not hide the others
                yield Row(name, f"{type(error).__name__}: {error}"[:80], math.inf, 0.0)


def table_of(rows: Iterable[Row]) -> Table:
    """One row per file, with a line for each thing compared."""
    table = Table(show_lines=True)
    for heading in ("file", "compared", "largest difference", "tolerance", ""):
        table.add_column(heading, no_wrap=True)
    for file, group in itertools.groupby(rows, key=lambda row: row.file):
        lines = list(group)
        table.add_row(
            file,
            "\n".join(escape(row.compared) for row in lines),
            "\n".join("" if row.difference is None else f"{row.difference:.1e}" for row in lines),
            "\n".join("" if row.tolerance is None else f"{row.tolerance:.0e}" for row in lines),
            "\n".join(f"[{STYLES[row.status]}]{row.status}[/]" for row in lines),
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder such as ../shared/golden")
    folder = parser.parse_args(arguments).folder
    rows = list(folder_rows(folder))
    if not any(row.status != "not yet" for row in rows):
        print(f"{folder}: no file here that can be checked")
        return 2
    console = Console()
    # A pipe claims 80 columns, which would cut file names.
    console.width = max(console.width, 120)
    console.print(table_of(rows))
    statuses = [row.status for row in rows]
    print(", ".join(f"{statuses.count(status)} {status}" for status in STYLES))
    return int("NOT OK" in statuses)


if __name__ == "__main__":
    raise SystemExit(main())
