"""Progress of long work."""

from types import SimpleNamespace

from evaluation import progress
from evaluation.progress import shown


def test_lines_in_a_log(monkeypatch, capsys):
    """A line when it is done, and every so often before."""
    clock = iter([0, 31, 40, 75])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(shown("abc", title="Scoring")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Scoring: 1 of 3 in 31.0 s", "Scoring: 3 of 3 in 1 min 15 s"]


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "in_batch_job", lambda: False)
    assert list(shown("abc", title="Scoring")) == ["a", "b", "c"]
    assert "Scoring: " not in capsys.readouterr().err
