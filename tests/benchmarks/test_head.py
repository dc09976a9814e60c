"""benchmarks.head: every form computes the same, what is missing is named, JSON is written."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

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


def test_optional_packages_are_given_the_same_loss(monkeypatch):
    """Stand-ins with the arguments that liger-kernel 0.8.5 and cut-cross-entropy 25.1.1 take."""

    class LigerFusedLinearCrossEntropyLoss:
        def __call__(self, lin_weight, _input, target, bias=None):
            return F.cross_entropy(F.linear(_input, lin_weight, bias), target)

    def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean"):
        assert e.shape[1] % 16 == 0
        return F.cross_entropy(e @ c.t(), targets, reduction=reduction)

    liger = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    cce = SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cce)
    x, weight, bias = torch.randn(5, 12), torch.randn(7, 12), torch.randn(7)
    targets = torch.randint(7, (5,))
    expected = head.all_at_once(x, weight, bias, targets)
    for make in (head.liger, head.cut_cross_entropy):
        torch.testing.assert_close(make()(x, weight, bias, targets), expected)
