"""How far tokenizing is, where nobody sees a bar."""

import logging

import numpy as np
import pytest

from corpora import packing_progress
from corpora.packing import Rows

BATCH = Rows(ids=np.zeros((0, 4), np.int32), lengths=np.zeros(0, np.int32), num_documents=1_000,
             num_tokens=50_000)  # fmt: skip


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (4, "75%, 2,000 documents, 10,000 tokens/s, 5.0 s left"),
        (None, "2,000 documents, 10,000 tokens/s"),
    ],
)
def test_a_batch_job_has_lines(monkeypatch, caplog, total: int | None, expected: str):
    """A bar was drawn into its log. What an earlier process did is no part of the speed."""
    caplog.set_level(logging.INFO, logger="corpora")
    moments = iter([0.0, 5.0, 10.0, 10.1])
    monkeypatch.setattr(packing_progress, "_LINE_EVERY", 7)
    monkeypatch.setattr(packing_progress, "in_batch_job", lambda: True)
    monkeypatch.setattr(packing_progress.time, "perf_counter", lambda: next(moments))
    shown = packing_progress.shown([BATCH] * 3, name="local train", first=1, total=total)
    assert len(list(shown)) == 3
    assert caplog.messages == [f"Tokenizing local train: {expected}"]


def test_a_terminal_has_a_bar(monkeypatch, caplog, capfd):
    monkeypatch.setattr(packing_progress, "in_batch_job", lambda: False)
    assert list(packing_progress.shown([BATCH] * 3, name="set", first=1, total=4)) == [BATCH] * 3
    assert "Tokenizing set" in capfd.readouterr().err and caplog.messages == []
