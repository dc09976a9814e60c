"""How fast a whole optimizer step is, and the memory it takes, beside the original's step.

    python -m benchmarks.train_step --algo bd3lm --model small --length 1024 --block-size 16 \
      --batch-size 2 --against reference --json train_step.json

Forward, backward, clipping, AdamW and moving average, on random rows with random weights. Each row
of the table has a process of its own; `benchmarks.reference` is what the original does, and
`benchmarks.flops` counts the model FLOPs. Tokens are clean ones, batch size x length. The peak of
memory is that of the whole process on a CPU, and of all tensors on a GPU; "without state" leaves
out the optimizer's moments and the moving average, which the reference has too.
"""

import argparse
from collections.abc import Sequence

from benchmarks.comparison import add_options, compare, read_options


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument(
        "--activation-checkpointing", choices=("none", "blocks"), nargs="+", default=["none"],
        help="ours alone",
    )  # fmt: skip
    return read_options(parser, words)


def main(words: Sequence[str] | None = None) -> None:
    """Time the steps, print the table and write JSON where wanted."""
    compare(options(words), work="train", title="training step")


if __name__ == "__main__":
    main()
