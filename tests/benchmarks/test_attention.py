"""FlexAttention's variants agree with every score in memory; one that fails is named."""

import json

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import Variant, exact, own_blocks
from tests.helpers.references import naive_attention

TINY = ["--device", "cpu", "--tiny"]


def test_own_blocks_are_dense_attention_under_a_diagonal_mask():
    q, k, v = torch.randn(3, 1, 2, 12, 4, generator=torch.Generator().manual_seed(0))
    blocks = torch.arange(12) // 3
    mask = blocks[:, None] == blocks
    out, log_sum = own_blocks(q, k, v, block_size=3)
    torch.testing.assert_close(out, naive_attention(q, k, v, mask=mask).float())
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(log_sum, scores.logsumexp(dim=-1))


def test_variants_agree(tmp_path, monkeypatch, capsys):
    """Also the first block, which sees nothing clean; a broken variant stops no other."""

    def broken(*_):
        raise RuntimeError("no such kernel\nand a trace")

    chosen = [v for v in attention.VARIANTS if v.name in ("flex, tiles 64", "sdpa")]
    chosen += [Variant(name="broken", make=broken),
               Variant(name="two calls", make=attention.two_calls(16))]  # fmt: skip
    monkeypatch.setattr(attention, "VARIANTS", chosen)
    path = tmp_path / "attention.json"
    attention.main([*TINY, "--block-sizes", "16", "--json", str(path)])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.pop("broken")["failed"] == "RuntimeError: no such kernel"
    assert len(rows) == 3
    for row in rows.values():
        assert row["error"] < 1e-6 and row["failed"] is None
    assert "no such kernel" in capsys.readouterr().out


def test_out_of_time_is_said():
    arguments = attention.options([*TINY, "--max-seconds", "-1"])
    assert {row.failed for row in attention.rows_of(arguments)} == {"out of time"}


def test_exact_has_the_gradients_of_q_k_v():
    arguments = attention.options([*TINY])
    tensors = attention.inputs(arguments)
    out, *grads = exact(tensors, length=64, block_size=4)
    assert out.shape == grads[0].shape == (128, 16) and len(grads) == 3
    assert out.dtype == torch.float64


def test_a_length_that_blocks_do_not_divide_is_refused():
    with pytest.raises(SystemExit):
        attention.options(["--length", "10", "--block-sizes", "4"])
