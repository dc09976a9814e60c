"""Tokens per second and peak memory of preparing rows, as `data.num_proc` has it.

    python -m benchmarks.tokenize --tokenizer FOLDER --text FILE --megabytes 100 --num-proc 2

The text is repeated up to the size, and cut into documents of so many characters.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import description
from corpora.packing import DOCUMENTS_PER_BATCH, RowMaker, map_in_order
from corpora.tokenization import load_tokenizer


def documents(text: str, *, megabytes: float, characters: int) -> Iterator[str]:
    """Yields pieces of the repeated text."""
    text = text * (characters // len(text) + 2)
    start = 0
    for _ in range(max(1, int(megabytes * 1e6) // characters)):
        yield text[start : start + characters]
        start = (start + characters) % (len(text) - characters)


def batches(pieces: Iterator[str]) -> Iterator[list[str]]:
    """Yields the documents as tokenizing takes them."""
    batch = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == DOCUMENTS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def measure(row_maker: RowMaker, pieces: Iterator[str], *, num_proc: int) -> dict[str, Any]:
    """Makes the rows, and counts memory of this process and of the largest of those it starts."""
    begin = time.perf_counter()
    num_tokens = sum(
        rows.num_tokens for rows in map_in_order(row_maker, batches(pieces), num_proc=num_proc)
    )
    seconds = time.perf_counter() - begin
    own, other = (
        resource.getrusage(who).ru_maxrss // 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "num_proc": num_proc,
        "tokens": num_tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(num_tokens / seconds),
        "peak_mb": own,
        "peak_mb_of_another": other,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the arguments say, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a folder or a name")
    parser.add_argument("--text", required=True, help="a UTF-8 file")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--characters", type=int, default=5_000, help="of a document")
    parser.add_argument("--num-proc", type=int, default=1)
    options = parser.parse_args(arguments)
    row_maker = RowMaker(tokenizer=load_tokenizer(options.tokenizer), length=1_024)
    text = Path(options.text).read_text(encoding="utf-8")
    pieces = documents(text, megabytes=options.megabytes, characters=options.characters)
    result = measure(row_maker, pieces, num_proc=options.num_proc)
    print(json.dumps(description(torch.device("cpu")) | result))


if __name__ == "__main__":
    main()
