"""What ppl_eval writes (the whole path is in test_end_to_end.py)."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest

from checkpointing.weights import Weights
from configuration import validate
from hf.model_card import evaluation_table, read_results
from likelihood.estimators import Estimator
from modes import ppl_eval as ppl_eval_module
from modes.ppl_eval import ppl_eval
from tests.helpers.small_run import overrides
from tests.parity.published import lightning_overrides
from tests.parity.rows import load_golden
from tests.runs.test_golden_likelihood import write_rows
from training.progress import PassProgress


def test_an_infinite_perplexity_is_null(compose, tmp_path, monkeypatch, capsys):
    """The file said `Infinity`, which is no JSON; the model card takes what it says now."""
    metrics = {"val/nll": 800.5, "val/nll_se": 9.0, "val/nll_mc_se": math.nan,
               "val/ppl": math.inf, "val/bpd": 1155.0, "val/tokens": 640.0,
               "val/rows": 20.0, "valid_var_0.00 - 1.00": math.nan}  # fmt: skip
    trainer = SimpleNamespace(
        global_rank=0, world_size=1, is_global_zero=True, validate=lambda *_, **__: [metrics]
    )
    monkeypatch.setattr(ppl_eval_module, "build_trainer", lambda *_: trainer)
    monkeypatch.setattr(ppl_eval_module, "read_weights", lambda _: Weights("a.ckpt", {}))
    model = SimpleNamespace(has_exact_nll=False)
    monkeypatch.setattr(ppl_eval_module, "load_model", lambda *_: model)
    monkeypatch.setattr(ppl_eval_module, "get_dataloaders", lambda *_, **__: (None, None))
    out = f"eval.results_path={tmp_path}/results.json"
    path = ppl_eval(compose(overrides(tmp_path, "mode=ppl_eval", out)))
    with open(path, encoding="utf-8") as file:
        found = json.load(file, parse_constant=pytest.fail)
    assert found["val/ppl"] is None and found["valid_var_0.00 - 1.00"] is None
    assert (found["val/nll"], found["num_tokens"]) == (800.5, 640)
    assert "inf" in capsys.readouterr().out
    assert found["val/nll_se"] == 9.0 and found["val/nll_mc_se"] is None
    assert found["val/ppl_95"] == [None, None]  # infinite too
    table = evaluation_table([read_results(path)], is_bound=False)
    assert "| local | not finite | 800.5000 | 1155.0000 | 640 | nelbo |" in table
    older = [{name: value for name, value in found.items() if name != "estimator"}]
    assert "| 640 | nll |" in evaluation_table(older, is_bound=False)
    assert "The NELBO is an upper bound" in evaluation_table(older, is_bound=True)


@pytest.fixture
def measured(shared, compose, tmp_path, monkeypatch):
    """Evaluate a golden checkpoint's rows with some keys; returns what was written."""
    monkeypatch.chdir(tmp_path)

    def run(*keys: str, name: str = "bd3lm_text8_block_size4") -> dict:
        source = shared / f"golden/lightning/{name}.ckpt"
        golden = load_golden(source.with_suffix(".expected.safetensors"))
        write_rows(golden, tmp_path / "rows.txt", times=1)
        config = compose([
            *lightning_overrides(source, golden),
            "data=local", "data.tokenizer_name_or_path=text8",
            f"data.train_path={tmp_path}/rows.txt", f"data.valid_path={tmp_path}/rows.txt",
            f"data.cache_dir={tmp_path}/cache",
            "+data.insert_valid_eos=false", "+data.insert_valid_special=false",
            "loader.eval_batch_size=150", "loader.num_workers=0", "trainer.devices=1",
            "trainer.precision=32", "wandb=null", *keys,
        ])  # fmt: skip
        validate(config)
        with open(ppl_eval(config), encoding="utf-8") as file:
            return json.load(file)

    return run


def test_an_exact_likelihood(measured, shared, monkeypatch, caplog, capsys):
    """The whole path, to the golden figure, with its error bar and without the search."""
    monkeypatch.setattr(ppl_eval_module, "PassProgress", partial(PassProgress, silence=0))
    with caplog.at_level("INFO"):
        found = measured("eval.likelihood=left_to_right", "eval.tokens_per_pass=2")
    expected = json.loads((shared / "golden/exact_likelihood.json").read_text())
    assert found["val/nll"] == pytest.approx(
        expected["left_to_right, 2 tokens per pass"], abs=2e-4
    )
    assert (found["estimator"], found["tokens_per_pass"]) == ("left_to_right", 2)
    assert found["passes_per_batch"] == 2 and found["num_rows"] == 200
    assert 0 < found["val/nll_se"] < 0.1 and found["val/nll_mc_se"] is None
    low, high = found["val/ppl_95"]
    assert low < found["val/ppl"] < high
    assert high == pytest.approx(math.exp(found["val/nll"] + 1.96 * found["val/nll_se"]))
    assert not any(key.startswith("valid_var") for key in found)
    assert "2 forward passes for each of 2 batches, 4 in all" in caplog.text
    assert "4 of 4 passes" in caplog.text
    assert "val/nll_se" in capsys.readouterr().out


def test_draws_have_an_error_of_their_own(measured):
    """The bound of several draws; the search, of one draw, is left to a plain evaluation."""
    found = measured("eval.num_draws=4")
    assert (found["estimator"], found["num_draws"]) == ("nelbo", 4)
    assert abs(found["val/nll"] - 2.4937) < 5 * found["val/nll_mc_se"]
    one = measured("trainer.limit_val_batches=1", "algo.clip_search_widths=[0.5]")
    assert (one["estimator"], one["num_draws"], one["passes_per_batch"]) == ("nelbo", 1, 1)
    assert one["val/nll_mc_se"] is None and one["val/nll_se"] > 0
    assert any(key.startswith("valid_var") for key in one)


def test_an_exact_nll_needs_no_passes(measured, caplog):
    found = measured("eval.likelihood=any_order", name="ar_text8")
    assert (found["estimator"], found["passes_per_batch"]) == ("nll", 1)
    assert "subsets" not in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["algo=sedd", "eval.likelihood=entropy"],
         "eval.likelihood=entropy: allowed with sedd is nelbo"),
        (["eval.likelihood=exact"], "eval.likelihood=exact: allowed are nelbo, nelbo_exact"),
        (["block_size=4", "eval.likelihood=strided", "eval.tokens_per_pass=3"],
         "eval.tokens_per_pass=3: allowed are the divisors of block_size=4"),
        (["eval.tokens_per_pass=2"], "eval.tokens_per_pass=2: allowed with eval.likelihood=nelbo"),
        (["block_size=4", "eval.likelihood=nelbo_exact", "eval.num_draws=2"],
         "eval.num_draws=2: allowed with eval.likelihood=nelbo_exact, drawn once, is 1"),
        (["algo=mdlm", "algo.time_conditioning=true", "eval.likelihood=confidence"],
         "eval.likelihood=confidence: allowed with algo.time_conditioning=True is nelbo"),
        (["eval.num_orders=0"], "eval.num_orders=0: allowed"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_first(keys, message, compose):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(compose(["mode=ppl_eval", *keys]))


@pytest.mark.parametrize(
    ("likelihood", "said"),
    [("any_order", "importance-weighted bound over eval.num_orders=4"),
     ("nelbo_exact", "each number of masks once per block")],
)  # fmt: skip
def test_blocks_too_large_for_subsets(likelihood, said):
    """The largest that there is, and what takes its place."""
    estimator = Estimator(likelihood=likelihood)
    message = estimator.stand_in(16)
    assert "the largest block whose subsets are summed is 10" in message and said in message
    assert estimator.stand_in(10) is None and estimator.num_passes(10) == 1023
    assert estimator.measured(16) != estimator.measured(10) == likelihood
    assert estimator.settings(16)["estimator"] in message
    assert estimator.num_passes(16) == {"any_order": 64, "nelbo_exact": 16}[likelihood]
