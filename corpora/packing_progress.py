"""How far tokenizing is: a bar in a terminal, lines in the log of a batch job."""

import logging
import time
from collections.abc import Iterable, Iterator

import rich.console
import rich.progress

from corpora.packing import Rows
from utils import duration, in_batch_job

logger = logging.getLogger(__name__)

# Seconds between two lines in the log of a batch job.
_LINE_EVERY = 60


def shown(batches: Iterable[Rows], *, name: str, first: int, total: int | None) -> Iterator[Rows]:
    """Yields the batches and shows how many there have been.

    Args:
        batches: of rows, as they are made.
        name: of the documents.
        first: batches that an earlier process has made.
        total: batches, those included; None where it is not known.
    """
    if in_batch_job():
        yield from _with_lines(batches, name=name, first=first, total=total)
    else:
        console = rich.console.Console(stderr=True)
        yield from rich.progress.track(
            batches, f"Tokenizing {name}", total, completed=first, console=console
        )


def _with_lines(
    batches: Iterable[Rows], *, name: str, first: int, total: int | None
) -> Iterator[Rows]:
    began = last_line = time.perf_counter()
    documents = tokens = 0
    for done, batch in enumerate(batches, start=1):
        yield batch
        documents += batch.num_documents
        tokens += batch.num_tokens
        now = time.perf_counter()
        if now - last_line < _LINE_EVERY:
            continue
        last_line, seconds = now, now - began
        facts = [f"{documents:,} documents", f"{tokens / seconds:,.0f} tokens/s"]
        if total is not None:
            facts.insert(0, f"{(first + done) / total:.0%}")
            facts.append(f"{duration((total - first - done) * seconds / done)} left")
        logger.info("Tokenizing %s: %s", name, ", ".join(facts))
