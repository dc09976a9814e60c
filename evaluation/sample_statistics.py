"""Numbers that describe a set of samples: means with errors, and how often texts repeat."""

import math
import statistics
from collections.abc import Sequence

Tokens = Sequence[int]


def column_statistics(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard error of the mean (from two finite values on), smallest, largest."""
    if not values:
        return dict.fromkeys(("mean", "median", "std. error", "min", "max"))
    has_error = len(values) > 1 and all(map(math.isfinite, values))
    error = statistics.stdev(values) / len(values) ** 0.5 if has_error else None
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std. error": error,
        "min": min(values),
        "max": max(values),
    }


def ngrams(tokens: Tokens, *, n: int) -> list[tuple[int, ...]]:
    """The n-grams of a text, in order; a text of fewer than n tokens has none."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_share(texts: Sequence[Tokens], *, n: int) -> float:
    """distinct-n (1510.03055): different n-grams of all texts together over all their n-grams.

    It falls with the number of tokens, so only sets of the same size compare. NaN without n-grams.
    """
    different, total = set(), 0
    for tokens in texts:
        found = ngrams(tokens, n=n)
        different.update(found)
        total += len(found)
    return len(different) / total if total else math.nan


def repeated_share(tokens: Tokens, *, n: int) -> float:
    """Share of a text's n-grams that the same text has had before (1908.04319); NaN without any."""
    return 1 - distinct_share([tokens], n=n)
