"""How far work on many texts is: a bar in a terminal, lines in the log of a batch job."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.progress
from rich.console import Console

from utils import duration, in_batch_job

LINE_EVERY = 30  # seconds between two lines in a log
Item = TypeVar("Item")


def shown(items: Sequence[Item], *, title: str) -> Iterator[Item]:
    """Yields the items; standard error shows how many have been worked on."""
    if not in_batch_job():
        console = Console(stderr=True)
        yield from rich.progress.track(items, title, console=console, transient=True)
        return
    began = last_line = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last_line >= LINE_EVERY or done == len(items):
            last_line, took = now, duration(now - began)
            print(f"{title}: {done} of {len(items)} in {took}", file=sys.stderr, flush=True)
