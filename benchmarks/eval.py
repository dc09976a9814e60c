"""How fast a validation batch is evaluated, beside the original: `ppl_eval`, and the range search.

    python -m benchmarks.eval --length 1024 --block-size 16 --batch-size 2 --against reference
    python -m benchmarks.eval --search --against reference
    python -m benchmarks.eval --block-size 4 --likelihood nelbo any_order left_to_right

No gradients, no dropout. With `--search` the batch is one of those on which a validation also
tries the ranges of `algo.clip_search_widths=[0.5,0.6,0.7,0.8,0.9]`, as it does on up to 100. The
reference takes one forward pass for each range; some of them are timed, and the rest takes as long
in proportion. `--likelihood` times values of `eval.likelihood`; the one draw of `nelbo` is then the
reference. Otherwise as `benchmarks.train_step`.
"""

import argparse
from collections.abc import Sequence

from benchmarks.comparison import add_options, compare, read_options
from likelihood.estimators import NAMES
from losses.clipped_schedule import MAX_BATCHES


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--search", action="store_true", help="search the clipped range, too")
    parser.add_argument("--likelihood", choices=NAMES, nargs="+", default=["nelbo"])
    arguments = read_options(parser, words)
    if arguments.search and arguments.algo != "bd3lm":
        parser.error(f"--search: {arguments.algo} has no clipped range; allowed is bd3lm")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Time the batches, print the table and write JSON where wanted."""
    arguments = options(words)
    compare(
        arguments,
        work="search" if arguments.search else "eval",
        title="validation batch with the search" if arguments.search else "validation batch",
        batches=MAX_BATCHES,
    )


if __name__ == "__main__":
    main()
