"""benchmarks.head: every form computes the same, what is missing is named, JSON is written."""

import json

import pytest

from benchmarks import head


@pytest.fixture(autouse=True)
def made_up_peak(monkeypatch):
    """It takes seconds to measure."""
    monkeypatch.setattr(head, "matmul_peak", lambda _device, _dtype: 1e12)


TINY = ["--rows", "24", "--vocab-size", "40", "--hidden-size", "8", "--seconds", "0"]


def test_all_forms_of_a_cpu_agree(tmp_path, capsys):
    """Liger and cut-cross-entropy, which are not installed or have no GPU, are named."""
    path = tmp_path / "new" / "head.json"
    head.main([*TINY, "--device", "cpu", "--json", str(path)])
    record = json.loads(path.read_text())
    assert [row["name"] for row in record["rows"]] == ["all at once", "a CPU's chunks",
                                                       "large chunks"]  # fmt: skip
    for row in record["rows"]:
        assert max(row["loss_error"], row["x_error"], row["weight_error"]) < 1e-5
        assert row["seconds"] > 0
    assert set(record["left_out"]) == {"large chunks, compiled", "Liger", "CCE"}
    printed = capsys.readouterr().out
    assert "CCE is left out (RuntimeError: needs a GPU)" in printed and "of peak" in printed


def test_a_package_that_is_absent_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(head.VARIANTS, "CCE", (lambda: __import__("no_such_package"), False))
    head.main([*TINY, "--device", "cpu", "--variants", "CCE"])
    assert "CCE is left out (ModuleNotFoundError: No module named" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "sizes"),
    [("cuda", (17408, 50258, 768, "bfloat16")), ("cpu", (256, 1000, 64, "float32"))],
)
def test_defaults_fit_the_device(device, sizes):
    arguments = head.options(["--device", device])
    found = arguments.rows, arguments.vocab_size, arguments.hidden_size, arguments.dtype
    assert found == sizes
