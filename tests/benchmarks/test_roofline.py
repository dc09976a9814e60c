"""The roofline: its counts against counted ones and hand numbers, its answers against the paper."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.flops import forward_flops
from benchmarks.roofline import GPUS, Workload, attention_pairs, computed_pairs, training_step
from losses.forward_process import NLL
from models.dit import DIT
from models.masks import AttentionPattern
from tests.helpers.references import brute_force_mask

P = AttentionPattern.BLOCK_DIFFUSION
SMALL = {"hidden_size": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12}
TINY = {"hidden_size": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "vocab_size": 40}


def small(**changes) -> Workload:
    return Workload(config=roofline.make_config(block_size=16, **SMALL), **changes)


@pytest.mark.parametrize(("length", "block_size", "tile"), [(12, 4, 4), (12, 3, 8), (16, 4, 8)])
@pytest.mark.parametrize("halves", [1, 2])
def test_tiles_are_those_of_the_brute_force_mask(length, block_size, tile, halves):
    """Also where lengths are no multiples of a tile."""
    sizes = {"q_len": halves * length, "kv_len": 2 * length}
    mask = brute_force_mask(P, **sizes, block_size=block_size)
    tiles = {(int(i) // tile, int(j) // tile) for i, j in mask.nonzero()}
    found = computed_pairs(P, **sizes, block_size=block_size, tile=tile)
    assert found == len(tiles) * tile**2


def test_visible_shares_of_the_usual_tiles():
    """N = 1,024, L = 16: 81 and 90 % of what tiles of 128 and 64 compute."""
    for tile, share in ((128, 0.81), (64, 0.90)):
        computed, visible = attention_pairs(small(tile=tile))
        assert visible / computed == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("algo", "pattern"), [("mdlm", AttentionPattern.FULL),
                                               ("ar", AttentionPattern.CAUSAL)])  # fmt: skip
def test_linear_layers_are_the_counted_ones(algo, pattern):
    """What torch counts in a pass over a tiny network; it counts half of no causal attention."""
    length, config = 16, roofline.make_config(block_size=16, adaln=False, **TINY)
    tokens = length - (algo == "ar")
    network = DIT(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, tokens, dtype=torch.int64), pattern=pattern)
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    found = forward_flops(config, algo=algo, length=length, interval=NLL).total
    seen = attention_pairs(Workload(config=config, algo=algo, length=length))[1]
    head = 2 * 32 * 40 * (tokens if algo == "ar" else length - 1)
    assert found - 4 * 32 * seen - head == products - 2 * 32 * 40 * tokens


def test_hand_numbers_of_the_small_model():
    """1.24 TFLOP per row; at batch 32 products take 61 ms of an H100, FlexAttention about 30."""
    step = training_step(small(head="chunked"), GPUS["H100"])
    milliseconds = {part.name: part.milliseconds for part in step.parts}
    assert milliseconds["linear layers"] == pytest.approx(61, rel=0.05)
    assert milliseconds["attention"] == pytest.approx(31, rel=0.1)
    assert milliseconds["elementwise"] == pytest.approx(38, rel=0.15)
    model_flops = step.share_of_peak * GPUS["H100"].flops * step.milliseconds / 1e3
    assert model_flops / 32 == pytest.approx(1.24e12, rel=0.02)
    assert step.milliseconds == pytest.approx(175, rel=0.15)


def test_what_costs_less_takes_less():
    kinds = ({"head": "chunked"}, {"head": "fused", "residual": 2})
    before, after = (training_step(small(**k), GPUS["H100"]).milliseconds for k in kinds)
    assert after < before - 10
    slow, fast = (training_step(small(), GPUS[name]).milliseconds for name in ("A5000", "H200"))
    assert fast < before < slow


def test_a_small_batch_waits_for_its_launches():
    gpu = roofline.asked_gpu(roofline.options(["--launch-us", "50"]))
    step = training_step(small(batch_size=1), gpu)
    launches = sum(part.launches for part in step.parts)
    assert step.milliseconds == pytest.approx(launches * 50e-3)


def test_sampling_is_as_fast_as_its_launches_at_batch_1():
    """Predicted by hand: 400 to 600 tokens/s eager; recorded more than twice that."""
    eager, recorded = (
        roofline.sampling_rate(small(), GPUS["H100"], batch_size=1, recorded=recorded)
        for recorded in (False, True)
    )
    assert 400 < eager < 600 and recorded > 2 * eager


def test_the_weights_are_those_of_the_network():
    config = roofline.make_config(block_size=4, **TINY)
    assert roofline.num_weights(config) == sum(p.numel() for p in DIT(config).parameters())


def test_the_papers_tokens():
    """524B tokens of OpenWebText, 65B of LM1B."""
    tokens = {run.name: sum(s for *_, s in run.phases) * 512 * run.length
              for run in roofline.paper_runs()}  # fmt: skip
    assert len(tokens) == 12
    assert tokens["OWT, bd3lm, L = 4"] == tokens["OWT, ar"] == pytest.approx(524e9, rel=0.01)
    assert tokens["LM1B, mdlm"] == pytest.approx(65e9, rel=0.01)


def test_command(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    roofline.main(["--gpu", "A100", "--model", "tiny", "--length", "64", "--json", str(path)])
    shown = capsys.readouterr().out
    assert "GPU hours" in shown and "data sheet: 312 TFLOP/s" in shown
    record = json.loads(path.read_text())
    assert {"date", "torch", "command", "step", "sampling", "paper_hours"} <= set(record)
    hours = 1e6 * 512 * 64 / record["step"]["tokens_per_second"] / 3600
    assert record["run_hours"] == pytest.approx(hours)
    with pytest.raises(SystemExit):
        roofline.options(["--length", "10", "--block-size", "4"])
