"""Numbers of samples, against values counted by hand."""

import math

import pytest

from evaluation.sample_statistics import (
    column_statistics,
    distinct_share,
    ngrams,
    repeated_share,
)


def test_statistics():
    """Of 10, 20, 60: the deviations from 30 are -20, -10, 30; divided by n - 1 and by n."""
    found = column_statistics([10.0, 20.0, 60.0])
    expected = {"mean": 30, "median": 20, "std. error": (1400 / 2 / 3) ** 0.5, "min": 10, "max": 60}
    assert found == pytest.approx(expected)
    assert column_statistics([7.0])["std. error"] is None
    assert set(column_statistics([]).values()) == {None}


def test_an_infinite_value_has_no_error():
    """A perplexity of 1e999 in a file ended in a traceback of `statistics`."""
    found = column_statistics([1.0, 2.0, float("inf")])
    assert found["std. error"] is None and found["max"] == float("inf")


def test_ngrams():
    assert ngrams([1, 2, 3, 4], n=3) == [(1, 2, 3), (2, 3, 4)]
    assert ngrams([1, 2], n=3) == []


def test_distinct_share_counts_over_all_texts_together():
    """Pairs 12 23 31 12, 12 22: six of which 12 23 31 22 differ; none goes from text to text."""
    texts = [[1, 2, 3, 1, 2], [1, 2, 2]]
    assert distinct_share(texts, n=1) == 3 / 8
    assert distinct_share(texts, n=2) == 4 / 6
    assert distinct_share(texts, n=4) == 1.0  # 1231 and 2312, and none of the second text
    assert math.isnan(distinct_share(texts, n=6))


def test_repeated_share_is_of_one_text():
    """1 2 3 4 1 2 3 4 has five 4-grams, the last of which is the first again."""
    assert repeated_share([1, 2, 3, 4] * 2, n=4) == pytest.approx(1 / 5)
    assert repeated_share([7] * 13, n=4) == pytest.approx(9 / 10)
    assert repeated_share(range(9), n=4) == 0
    assert math.isnan(repeated_share([1, 2, 3], n=4))
