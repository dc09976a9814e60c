"""The training curve and the table of results."""

import pytest

from evaluation.report import draw_training_curve, print_table, read_curve, smooth

CSV = "step,trainer/loss,val/nll\n0,3.5,\n1,,2.5\n2,2.5,\n"


def test_curves_skip_empty_cells(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(CSV)
    assert read_curve(path, "trainer/loss") == ([0, 2], [3.5, 2.5])
    assert read_curve(path, "val/nll") == ([1], [2.5])
    assert read_curve(path, "unknown") == ([], [])
    assert read_curve(tmp_path / "missing.csv", "val/nll") == ([], [])


def test_smoothing_is_a_trailing_mean():
    assert smooth([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]
    assert smooth([1.0, 2.0], window=1) == [1.0, 2.0]
    assert smooth([], window=3) == []


BROKEN = "step,trainer/loss,val/nll\n0,inf,\n1,nan,\n2,2.5,inf\n"


@pytest.mark.parametrize(
    "text", [CSV, BROKEN, "step,val/nll\n1,2.5\n", "step,val/nll\n1,inf\n",
             "step,trainer/loss\n", None]
)  # fmt: skip
def test_any_log_gives_a_picture(text, tmp_path):
    path, png = tmp_path / "metrics.csv", tmp_path / "curve.png"
    if text is not None:
        path.write_text(text)
    draw_training_curve(path, png, title="any")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_table(capsys):
    print_table("Likelihood", {"val/nll": 1.23456, "rows": 1200, "file": "x.ckpt", "best": None})
    said = capsys.readouterr().out
    for text in ("Likelihood", "1.2346", "1,200", "x.ckpt", "None"):
        assert text in said
